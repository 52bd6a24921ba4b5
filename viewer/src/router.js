// The address: a hash route such as `#/f/ae-resid-delta-mlp.2/17?group=top`. Everything that a page shows is
// in it, so that a link shows the same. Hash routes work behind any path prefix and from file://.
import { signal } from '@preact/signals';

/** @typedef {{path: string[], query: Record<string, string>}} Route */

/** @param {string} hash @returns {Route} */
export function parse(hash) {
  const text = hash.replace(/^#?\/?/, '');
  const mark = text.indexOf('?');
  const path = mark < 0 ? text : text.slice(0, mark);
  const query = mark < 0 ? '' : text.slice(mark + 1);
  return {
    path: path.split('/').filter(Boolean).map(decoded),
    query: Object.fromEntries(new URLSearchParams(query)),
  };
}

/** The whole number that a part of an address is; NaN if it is none. @param {string | undefined} text @param {number} [otherwise] */
export function whole(text, otherwise = 0) {
  return text === undefined ? otherwise : /^\d+$/.test(text) ? Number(text) : NaN;
}

/** @param {string} part */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a `%` that a person typed
  }
}

/**
 * The address of a page. Parameters that are null, undefined or empty are left out.
 * @param {(string | number)[]} path
 * @param {Record<string, string | number | null | undefined>} [query]
 */
export function href(path, query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== '');
  const text = new URLSearchParams(kept.map(([key, value]) => [key, String(value)])).toString();
  return `#/${path.map((part) => encodeURIComponent(String(part))).join('/')}${text && `?${text}`}`;
}

export const route = signal(parse(globalThis.location?.hash ?? ''));

function read() {
  const next = parse(location.hash);
  if (JSON.stringify(next) !== JSON.stringify(route.peek())) route.value = next;
}

/** Follow the browser's address. Called once. */
export function startRouter() {
  addEventListener('hashchange', read);
  addEventListener('popstate', read);
  read();
}

/**
 * Show a page.
 * @param {string} address made by {@link href}
 * @param {{replace?: boolean}} [options] replace: Back does not return to where we are now
 */
export function go(address, { replace = false } = {}) {
  if (address === location.hash) return;
  history[replace ? 'replaceState' : 'pushState'](null, '', address);
  read();
}

/**
 * Change parameters of this page; null removes one.
 * @param {Record<string, string | number | null | undefined>} patch
 * @param {{push?: boolean}} [options] push: Back undoes it
 */
export function setQuery(patch, { push = false } = {}) {
  const { path, query } = route.peek();
  go(href(path, { ...query, ...patch }), { replace: !push });
}
