// What stands in a panel while there is nothing, nothing yet, or no answer.
import { useEffect, useState } from 'preact/hooks';
import { visible } from '../format.js';

/** Grey lines of the height of what will come. @param {{lines?: number, label?: string}} props */
export function Loading({ lines = 3, label = 'Loading' }) {
  return (
    <div class="loading" role="status" aria-label={label}>
      {Array.from({ length: lines }, (_, i) => <i class={`bone w${i % 4}`} />)}
    </div>
  );
}

/** @param {{title: string, children?: any}} props */
export function Empty({ title, children }) {
  return (
    <div class="empty">
      <p class="empty-title">{title}</p>
      {children && <div class="empty-more">{children}</div>}
    </div>
  );
}

/** Which failures pass by themselves, and what they are called. */
const TITLES = /** @type {Record<string, string>} */ ({
  unreachable: 'The server does not answer',
  model_loading: 'The model is being loaded',
  model_failed: 'The model could not be loaded',
  no_model: 'There is no model here',
  http_401: 'This page needs its key',
  unauthorized: 'This page needs its key',
  http_403: 'This is not allowed here',
  http_404: 'There is no such thing here',
  http_412: 'Somebody else has changed this',
  http_413: 'That is too long',
  http_422: 'That cannot be asked for',
  http_429: 'The queue is full',
  http_501: 'This server cannot do that',
  http_503: 'Not now',
});

/**
 * @param {{problem: import('../api.js').Problem, retry?: () => void}} props
 */
export function Failure({ problem, retry }) {
  const first = problem.retryAfter ?? (problem.code === 'model_loading' ? 1 : null);
  // Twice as long each time, but for a model that is being loaded.
  const waits = first === null || problem.code === 'model_loading' ? first : Math.min(60, first * 2 ** problem.attempt);
  const [left, setLeft] = useState(waits);
  useEffect(() => {
    if (problem.status !== 0 || !retry) return;
    addEventListener('nx-back', retry);
    return () => removeEventListener('nx-back', retry);
  }, [problem]);
  useEffect(() => {
    setLeft(waits);
    if (waits === null || !retry) return;
    const end = performance.now() + waits * 1000;
    const timer = setInterval(() => {
      const seconds = Math.ceil((end - performance.now()) / 1000);
      setLeft(Math.max(0, seconds));
      if (seconds <= 0) {
        clearInterval(timer);
        retry();
      }
    }, 250);
    return () => clearInterval(timer);
  }, [problem]);
  const calm = ['model_loading', 'stopped'].includes(problem.code) || problem.status === 404;
  return (
    <div class={`failure${calm ? ' calm' : ''}`} role={calm ? 'status' : 'alert'}>
      <p class="empty-title">{TITLES[problem.code] ?? TITLES[`http_${problem.status}`] ?? (problem.title || 'Something went wrong')}</p>
      <div class="empty-more">
        <p>{visible(problem.message)}</p>
        {problem.allowed && problem.allowed.length > 0 && (
          <p>Allowed: {problem.allowed.slice(0, 12).map((value, i) => <>{i > 0 && ', '}<code>{String(value)}</code></>)}</p>
        )}
        {(problem.code === 'unauthorized' || problem.status === 401) && (
          <p>Open the address that <code>neuron-explainer serve</code> has printed: the key is in it.</p>
        )}
        {retry && (
          <p class="row">
            <button type="button" onClick={retry}>Try again</button>
            {left !== null && left > 0 && <span class="soft">by itself in {left} s</span>}
          </p>
        )}
        {problem.requestId && <p class="soft small">Request {problem.requestId}</p>}
      </div>
    </div>
  );
}

/**
 * What was asked for, or the state that it is in. Old data stays while new data is on its way.
 * @param {{asked: import('../api.js').Asked<any>, lines?: number, children: (data: any) => any}} props
 */
export function Answer({ asked, lines, children }) {
  if (asked.error) return <Failure problem={asked.error} retry={asked.retry} />;
  if (asked.data === undefined) return <Loading lines={lines} />;
  return <div class={asked.stale ? 'stale' : undefined} aria-busy={asked.loading}>{children(asked.data)}</div>;
}
