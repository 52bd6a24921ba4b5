// Attention heads: a value belongs to a pair of tokens, one that looks and one at or before it.
import { useMemo, useState } from 'preact/hooks';
import { PairTable } from '../components/pair-table.jsx';
import { Tokens } from '../components/tokens.jsx';
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
      {grid && <PairTable words={example.ids.map((id) => tokenText(id, words))} valueOf={(q, k) => triangle[(q * (q + 1)) / 2 + k]} scale={scale} />}
    </div>
  );
}
