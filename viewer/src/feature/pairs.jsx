// Attention heads: a value belongs to a pair of tokens, one that looks and one at or before it.
import { useMemo, useState } from 'preact/hooks';
import { Tokens, level, levelClass } from '../components/tokens.jsx';
import { fixed } from '../format.js';
import { tokenText } from '../vocabulary.js';

/** The token that looks, of a place in the lower triangle. @param {number} place */
export function pairQuery(place) {
  return Math.floor((Math.sqrt(8 * place + 1) - 1) / 2);
}

/** @param {{example: import('./types.js').Example, words: import('../vocabulary.js').Vocabulary, scale: number, label: string}} props */
export function Pairs({ example, words, scale, label }) {
  const n = example.ids.length;
  const [query, setQuery] = useState(pairQuery(example.peak));
  const [grid, setGrid] = useState(false);
  const triangle = useMemo(() => {
    const found = new Float64Array((n * (n + 1)) / 2);
    for (const [place, value] of example.acts) found[place] = value;
    return found;
  }, [example]);
  const row = useMemo(() => {
    const found = new Float64Array(n);
    found.set(triangle.subarray((query * (query + 1)) / 2, (query * (query + 1)) / 2 + query + 1));
    return found;
  }, [triangle, query]);
  return (
    <div>
      <Tokens ids={example.ids} values={row} words={words} scale={scale} label={`${label}; choose the token that looks`} onPick={setQuery} picked={query} />
      <button type="button" class="plain small" aria-expanded={grid} onClick={() => setGrid(!grid)}>{grid ? 'hide all pairs' : 'all pairs'}</button>
      {grid && <Grid ids={example.ids} words={words} triangle={triangle} scale={scale} />}
    </div>
  );
}

/** All pairs as a table: a row for each token that looks. @param {{ids: number[], words: import('../vocabulary.js').Vocabulary, triangle: Float64Array, scale: number}} props */
function Grid({ ids, words, triangle, scale }) {
  return (
    <div class="pair-scroll" tabIndex={0} role="group" aria-label="All pairs of tokens">
      <table class="pairs">
        <thead>
          <tr><td />{ids.map((id) => <th scope="col"><span>{tokenText(id, words)}</span></th>)}</tr>
        </thead>
        <tbody>
          {ids.map((id, q) => (
            <tr>
              <th scope="row">{tokenText(id, words)}</th>
              {ids.map((_, k) => {
                const value = k <= q ? triangle[(q * (q + 1)) / 2 + k] : null;
                return <td class={value === null ? '' : levelClass(level(value, scale)).trim()} title={value === null ? undefined : fixed(value)} />;
              })}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
