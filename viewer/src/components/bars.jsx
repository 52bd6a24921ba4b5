// Tokens with a value each, as a table with bars.
import { fixed } from '../format.js';
import { tokenText } from '../vocabulary.js';
import { Word } from './tokens.jsx';

/**
 * @param {{items: {id: number, value: number}[], words: import('../vocabulary.js').Vocabulary, most: number, caption: string, unit?: string, digits?: number}} props
 * `most` is the value of a full bar
 */
export function TokenBars({ items, words, most, caption, unit = 'value', digits = 3 }) {
  return (
    <table class="token-bars">
      <caption>{caption}</caption>
      <thead class="hidden"><tr><th scope="col">token</th><th scope="col">{unit}</th></tr></thead>
      <tbody>
        {items.map(({ id, value }) => (
          <tr key={id}>
            <th scope="row">
              <i class={value < 0 ? 'negative' : ''} style={{ width: `${Math.min(100, (100 * Math.abs(value)) / (most || 1)).toFixed(1)}%` }} />
              <Word text={tokenText(id, words)} />
            </th>
            <td class="num">{fixed(value, digits)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
