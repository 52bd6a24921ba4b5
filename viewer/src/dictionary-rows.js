// The rows of a dictionary's table, page by page: a page's cursor stands in the reply before it.
import { useEffect, useRef, useState } from 'preact/hooks';
import { Problem, get, url } from './api.js';

export const PAGE = 200;

/**
 * @typedef {object} Rows
 * @property {number | null} total null until it is known
 * @property {(i: number) => any} row
 * @property {() => any[]} all those that are here
 * @property {string | undefined} python
 * @property {(i: number) => import('./vocabulary.js').Vocabulary} words
 * @property {(from: number, to: number) => void} want
 * @property {Problem | null} problem
 * @property {() => void} retry
 * @property {boolean} stale whether these are the rows of an earlier query
 */

/** @param {string} id @param {Record<string, any>} query @returns {Rows} */
export function useRows(id, query) {
  const key = JSON.stringify([id, query]);
  const [turn, setTurn] = useState(0);
  const [state, setState] = useState({ key: '', pages: /** @type {any[]} */ ([]), problem: /** @type {Problem | null} */ (null) });
  const latest = useRef(state);
  latest.current = state;
  const wanted = useRef(0); // page up to which somebody looks
  const wake = useRef(() => {});
  useEffect(() => {
    const abort = new AbortController();
    wanted.current = 0;
    /** @type {any[]} */ let pages = [];
    let running = false;
    async function run() {
      if (running) return;
      running = true;
      try {
        while (!abort.signal.aborted && pages.length <= wanted.current && (pages.length === 0 || pages.at(-1).next_cursor)) {
          const cursor = pages.at(-1)?.next_cursor;
          const page = await get(url(['dictionaries', id, 'features'], { ...query, cursor, limit: PAGE }), { signal: abort.signal });
          pages = [...pages, page];
          if (!abort.signal.aborted) setState({ key, pages, problem: null });
        }
      } catch (error) {
        if (abort.signal.aborted) return;
        if (!(error instanceof Problem)) throw error;
        setState({ key, pages, problem: error });
      } finally {
        running = false;
      }
    }
    wake.current = run;
    run();
    return () => abort.abort();
  }, [key, turn]);
  const { pages } = state;
  return {
    total: pages[0]?.total ?? null,
    row: (i) => pages[Math.floor(i / PAGE)]?.items[i % PAGE],
    all: () => pages.flatMap((page) => page.items),
    python: pages[0]?.python,
    words: (i) => pages[Math.floor(i / PAGE)] ?? { vocab: {} },
    want: (_, to) => {
      wanted.current = Math.max(wanted.current, Math.floor(Math.max(0, to - 1) / PAGE));
      wake.current();
    },
    problem: state.key === key ? state.problem : null,
    retry: () => setTurn((n) => n + 1),
    stale: state.key !== key,
  };
}

/** Columns of the CSV file. */
const FIGURES = ['unit', 'density', 'max', 'mean', 'label', 'score'];

/**
 * All rows of a query as CSV.
 * @param {string} id @param {Record<string, any>} query @param {(share: number) => void} onProgress
 */
export async function allAsCsv(id, query, onProgress) {
  const lines = [FIGURES.join(',')];
  let cursor;
  do {
    const page = await get(url(['dictionaries', id, 'features'], { ...query, cursor, limit: PAGE }));
    for (const row of page.items) lines.push(FIGURES.map((name) => csvCell(row[name])).join(','));
    cursor = page.next_cursor;
    onProgress((lines.length - 1) / Math.max(page.total, 1));
  } while (cursor);
  return `${lines.join('\r\n')}\r\n`;
}

/** A cell as RFC 4180 writes it; a label that a spreadsheet would run as a formula gets an apostrophe. @param {any} value */
export function csvCell(value) {
  if (value === null || value === undefined) return '';
  let text = String(value);
  if (typeof value === 'string' && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

/** Let the browser save a text as a file. @param {string} name @param {string} text @param {string} type */
export function save(name, text, type) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
