import { useEffect, useState } from 'preact/hooks';
import { Problem } from '../api.js';
import { Failure, Loading } from '../components/states.jsx';

/** @type {any} */ let pages = null;

/**
 * A page of more.js, which is loaded when the first of them is opened.
 * @param {keyof typeof import('./more.js')} name
 * @returns {(props: {path: string[], query: Record<string, string>}) => any}
 */
export function later(name) {
  return function Later(props) {
    const [, redraw] = useState(0);
    const [problem, setProblem] = useState(/** @type {Problem | null} */ (null));
    function load() {
      setProblem(null);
      import('./more.js').then(
        (found) => {
          pages = found;
          redraw((n) => n + 1);
        },
        () => setProblem(new Problem({ code: 'unreachable', detail: 'This page could not be loaded.' }, 0)),
      );
    }
    useEffect(() => {
      if (!pages) load();
    }, []);
    if (problem) return <div class="page"><Failure problem={problem} retry={load} /></div>;
    if (!pages) return <div class="page"><Loading lines={10} /></div>;
    const Page = pages[name];
    return <Page {...props} />;
  };
}
