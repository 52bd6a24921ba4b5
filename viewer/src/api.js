// The one way to the server. Replies of GET are kept for the session (their bodies never change but for
// labels and bookmarks, see `forget`); requests that nobody waits for any more are aborted.
import { signal } from '@preact/signals';
import { useEffect, useRef, useState } from 'preact/hooks';

/** What a request came to: RFC 9457 problem details, or our own for a server that cannot be reached. */
export class Problem extends Error {
  /** @param {Record<string, any>} body @param {number} status */
  constructor(body, status) {
    super(body.detail || body.title || `The server answered ${status}.`);
    this.status = status;
    /** @type {string} */ this.code = body.code || (status ? `http_${status}` : 'unreachable');
    /** @type {string} */ this.title = body.title || '';
    /** @type {(string | number)[] | undefined} */ this.loc = body.loc;
    /** @type {any[] | undefined} */ this.allowed = body.allowed;
    /** @type {number | null} seconds */ this.retryAfter = body.retry_after ?? null;
    /** How often this was tried again before. */ this.attempt = 0;
    /** @type {string | undefined} */ this.requestId = body.request_id;
  }
}

/** What the status bar shows: requests on their way, the duration of the last one, whether the server is there. */
export const traffic = signal({ inFlight: 0, lastMs: /** @type {number | null} */ (null), online: true });

const MOST_KEPT = 200;
/** @type {Map<string, {data: any, etag: string | null}>} */
const kept = new Map();

/**
 * The address of a route below the prefix; parameters that are null, undefined or empty are left out.
 * @param {(string | number)[]} path
 * @param {Record<string, any>} [query]
 */
export function url(path, query = {}) {
  const params = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== '');
  const text = new URLSearchParams(params.map(([key, value]) => [key, String(value)])).toString();
  return `api/v1/${path.map((part) => encodeURIComponent(String(part))).join('/')}${text && `?${text}`}`;
}

/**
 * Send a request and wait for the head of its reply.
 * @param {string} method
 * @param {string} address made by {@link url}
 * @param {{body?: any, signal?: AbortSignal, headers?: Record<string, string>, raw?: boolean}} [options] raw: the body is a text already
 */
export async function send(method, address, { body, signal: abort, headers = {}, raw = false } = {}) {
  const started = performance.now();
  traffic.value = { ...traffic.peek(), inFlight: traffic.peek().inFlight + 1 };
  let online = true;
  try {
    const reply = await fetch(address, {
      method,
      signal: abort,
      credentials: 'same-origin',
      headers: body === undefined ? headers : { 'content-type': 'application/json', ...headers },
      body: body === undefined ? undefined : raw ? body : JSON.stringify(body),
    });
    if (!reply.ok) throw new Problem(await reply.json().catch(() => ({})), reply.status);
    return reply;
  } catch (error) {
    if (error instanceof Problem || abort?.aborted) throw error;
    online = false;
    throw new Problem({ title: 'The server does not answer', detail: 'It has ended, or the connection is gone.' }, 0);
  } finally {
    const { inFlight, lastMs } = traffic.peek();
    traffic.value = {
      inFlight: inFlight - 1,
      lastMs: abort?.aborted ? lastMs : performance.now() - started,
      online,
    };
  }
}

/** @param {string} address @param {{signal?: AbortSignal}} [options] */
export async function get(address, options) {
  const found = kept.get(address);
  if (found) return found.data;
  const reply = await send('GET', address, options);
  const data = await reply.json();
  if (!address.startsWith('api/v1/health') && !address.startsWith('api/v1/model') && !address.startsWith('api/v1/jobs')) {
    kept.set(address, { data, etag: reply.headers.get('etag') });
    if (kept.size > MOST_KEPT) kept.delete(/** @type {string} */ (kept.keys().next().value));
  }
  return data;
}

/** @param {string} address @param {any} body @param {{signal?: AbortSignal}} [options] */
export async function post(address, body, options) {
  return (await send('POST', address, { ...options, body })).json();
}

/** Forget the kept replies whose address begins so. @param {string} prefix */
export function forget(prefix) {
  for (const address of kept.keys()) if (address.startsWith(prefix)) kept.delete(address);
}

/**
 * What is asked for, as it stands: `data` of an earlier address is kept (and `stale`) until the new reply is
 * there, so that nothing jumps. While a reply comes in parts, `data` is what there is of it, and `loading`.
 * @template T
 * @typedef {{data: T | undefined, error: Problem | undefined, loading: boolean, stale: boolean, retry: () => void, cancel: () => void}} Asked
 */

/**
 * Ask for something as long as the component shows it.
 * @param {string | null} key what is asked for; a new key aborts the request of the old one. null: nothing
 * @param {(abort: AbortSignal, show: (part: any) => void) => Promise<any>} load
 * @param {{delay?: number, known?: any}} [options] delay: milliseconds of rest before the request is sent
 * @returns {Asked<any>}
 */
export function useAsk(key, load, { delay = 0, known } = {}) {
  const [state, set] = useState(/** @type {{key: string | null, data?: any, error?: Problem, partial?: boolean}} */ ({ key: null }));
  const [turn, setTurn] = useState(0);
  const attempts = useRef({ key, n: 0 });
  const running = useRef(/** @type {AbortController | null} */ (null));
  const at = key && known !== undefined ? { key, data: known } : state;
  useEffect(() => {
    if (key === null) return;
    if (known !== undefined) return set({ key, data: known });
    const abort = (running.current = new AbortController());
    const timer = setTimeout(async () => {
      try {
        const data = await load(abort.signal, (part) => abort.signal.aborted || set({ key, data: part, partial: true }));
        if (!abort.signal.aborted) set({ key, data });
      } catch (error) {
        if (abort.signal.aborted) return;
        if (!(error instanceof Problem)) throw error;
        error.attempt = attempts.current.key === key ? attempts.current.n : 0;
        set((old) => ({ key, data: old.data, error }));
      }
    }, delay);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [key, turn]);
  const settled = at.key === key;
  return {
    data: key === null ? undefined : at.data,
    error: settled ? at.error : undefined,
    loading: key !== null && (!settled || !!at.partial),
    stale: !settled || !!at.error,
    retry: () => {
      attempts.current = { key, n: attempts.current.key === key ? attempts.current.n + 1 : 1 };
      set((old) => ({ key: null, data: old.data }));
      setTurn((n) => n + 1);
    },
    cancel: () => {
      running.current?.abort();
      set((old) => ({ key, data: old.data, error: new Problem({ code: 'stopped', title: 'Stopped', detail: 'You have stopped this request.' }, 499) }));
    },
  };
}

/**
 * Ask for a reply of GET, see {@link useAsk}.
 * @param {string | null} address
 * @param {{delay?: number}} [options]
 */
export function useGet(address, options = {}) {
  const known = address === null ? undefined : kept.get(address)?.data;
  return useAsk(address, (abort) => get(/** @type {string} */ (address), { signal: abort }), { ...options, known });
}

/**
 * The events of a reply that is a stream (server-sent events over a POST), one after the other.
 * @param {string} address @param {any} body @param {AbortSignal} abort
 * @returns {AsyncGenerator<{event: string, data: any}>}
 */
export async function* stream(address, body, abort) {
  const reply = await send('POST', address, { body, signal: abort, headers: { accept: 'text/event-stream' } });
  const reader = /** @type {ReadableStream<any>} */ (reply.body).pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = /** @type {string} */ (blocks.pop());
    for (const block of blocks) {
      let event = 'message';
      let data = '';
      for (const line of block.split(/\r?\n/)) {
        if (line.startsWith('event:')) event = line.slice(6).trim();
        if (line.startsWith('data:')) data += line.slice(5).trim();
      }
      if (data) yield { event, data: JSON.parse(data) };
    }
  }
}
