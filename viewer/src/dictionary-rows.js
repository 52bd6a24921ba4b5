// The rows of a dictionary's table, by pages; only those that somebody looks at are asked for.
import { useEffect, useRef, useState } from 'preact/hooks';
import { Problem, get, url } from './api.js';

export const PAGE = 100;

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

/** The address of a page: its cursor is the number of its first row. @param {string} id @param {Record<string, any>} query @param {number} page */
const addressOf = (id, query, page) => url(['dictionaries', id, 'features'], { ...query, cursor: page ? page * PAGE : null, limit: PAGE });

/** @param {string} id @param {Record<string, any>} query @returns {Rows} */
export function useRows(id, query) {
  const key = JSON.stringify([id, query]);
  const [turn, setTurn] = useState(0);
  const [state, setState] = useState({ key: '', pages: /** @type {Record<number, any>} */ ({}), problem: /** @type {Problem | null} */ (null) });
  const want = useRef((/** @type {number} */ _from, /** @type {number} */ _to) => {});
  useEffect(() => {
    const abort = new AbortController();
    /** @type {Record<number, any>} */ let pages = {};
    /** @type {number[]} */ let wanted = [0];
    let running = false;
    async function run() {
      if (running) return;
      running = true;
      try {
        // What is in view now comes first: pages that were scrolled past are not asked for.
        for (let page = wanted.find((n) => !pages[n]); page !== undefined && !abort.signal.aborted; page = wanted.find((n) => !pages[n])) {
          const found = await get(addressOf(id, query, page), { signal: abort.signal });
          pages = { ...pages, [page]: found };
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
    want.current = (from, to) => {
      const [first, last] = [Math.floor(from / PAGE), Math.floor(Math.max(0, to - 1) / PAGE)];
      wanted = Array.from({ length: last - first + 1 }, (_, i) => first + i);
      run();
    };
    run();
    return () => abort.abort();
  }, [key, turn]);
  const { pages } = state;
  const any = Object.values(pages)[0];
  return {
    total: any?.total ?? null,
    row: (i) => pages[Math.floor(i / PAGE)]?.items[i % PAGE],
    all: () => Object.values(pages).flatMap((page) => page.items),
    python: any?.python,
    words: (i) => pages[Math.floor(i / PAGE)] ?? { vocab: {} },
    want: (from, to) => want.current(from, to),
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
  for (let page = 0, more = true; more; page++) {
    const found = await get(addressOf(id, query, page));
    for (const row of found.items) lines.push(FIGURES.map((name) => csvCell(row[name])).join(','));
    more = found.next_cursor !== null;
    onProgress((lines.length - 1) / Math.max(found.total, 1));
  }
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
