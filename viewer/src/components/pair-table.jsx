import { fixed, percentage } from '../format.js';
import { level, levelClass } from './tokens.jsx';

/**
 * Values of pairs of tokens: rows look, columns are looked at.
 * @param {{words: string[], valueOf: (query: number, key: number) => number, scale: number, share?: boolean}} props share: in per cent
 */
export function PairTable({ words, valueOf, scale, share = true }) {
  return (
    <div class="scroll-x" tabIndex={0} role="region" aria-label="Which token looks at which">
      <table class="pair-table">
        <thead><tr><th scope="col"><span class="hidden">Token that looks</span></th>{words.map((word) => <th scope="col"><span>{word}</span></th>)}</tr></thead>
        <tbody>
          {words.map((word, q) => (
            <tr>
              <th scope="row">{word}</th>
              {words.slice(0, q + 1).map((_, k) => {
                const value = valueOf(q, k);
                return <td class={levelClass(level(value, scale)).trim()} data-value={value} title={`${word} looks at ${words[k]}: ${share ? percentage(value) : fixed(value)}`}>{value >= 0.1 * scale ? (share ? Math.round(100 * value) : fixed(value, 1)) : ''}</td>;
              })}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
