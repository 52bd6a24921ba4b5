import { Problem, useAsk } from '../api.js';
import { Failure, Loading } from '../components/states.jsx';

/** @type {any} */ let pages = null;
const more = () => import('./more.js').catch(() => { throw new Problem({ code: 'unreachable', detail: 'This page could not be loaded.' }, 0); });

/**
 * A page of more.js, which is loaded when the first of them is opened.
 * @param {keyof typeof import('./more.js')} name
 * @returns {(props: {path: string[], query: Record<string, string>}) => any}
 */
export function later(name) {
  return function Later(props) {
    const asked = useAsk(pages ? null : 'more.js', more);
    pages ??= asked.data;
    if (!pages) return <div class="page">{asked.error ? <Failure problem={asked.error} retry={asked.retry} /> : <Loading lines={10} />}</div>;
    const Page = pages[name];
    return <Page {...props} />;
  };
}
