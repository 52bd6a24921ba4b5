// What token ids write. A reply holds `vocab` {id: text}, and `vocab_bytes` {id: hex} for tokens whose bytes
// are no whole characters.
import { byteText, visible } from './format.js';

/** @typedef {{vocab: Record<string, string>, vocab_bytes?: Record<string, string>}} Vocabulary */

/**
 * Tokens that are drawn as one: a single token, or several whose bytes are characters only together.
 * @typedef {{from: number, to: number, text: string, raw: string}} Piece
 */

/** @param {string} hex */
function bytesOf(hex) {
  return Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

const strict = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** @param {Uint8Array} bytes @returns {string | null} */
function decoded(bytes) {
  try {
    return strict.decode(bytes);
  } catch {
    return null;
  }
}

/** What one token writes, for display. @param {number} id @param {Vocabulary} words */
export function tokenText(id, words) {
  const hex = words.vocab_bytes?.[id];
  if (hex !== undefined) return byteText(bytesOf(hex));
  const text = words.vocab[id];
  return text === undefined ? `#${id}` : text === '' ? '∅' : visible(text);
}

const MOST_JOINED = 12; // tokens that may write one group of characters

/**
 * Tokens as pieces for display. Bytes that become characters with those of the next tokens are drawn
 * together; others as ⟨E2⟩.
 * @param {number[]} ids @param {Vocabulary} words @returns {Piece[]}
 */
export function pieces(ids, words) {
  /** @type {Piece[]} */ const found = [];
  let i = 0;
  while (i < ids.length) {
    const joined = words.vocab_bytes?.[ids[i]] === undefined ? null : join(ids, i, words);
    if (joined) {
      found.push({ from: i, to: joined.to, text: visible(joined.text), raw: joined.text });
      i = joined.to;
    } else {
      found.push({ from: i, to: i + 1, text: tokenText(ids[i], words), raw: words.vocab[ids[i]] ?? '' });
      i++;
    }
  }
  return found;
}

/** @param {number[]} ids @param {number} from @param {Vocabulary} words */
function join(ids, from, words) {
  let bytes = new Uint8Array();
  for (let i = from; i < Math.min(ids.length, from + MOST_JOINED); i++) {
    const hex = words.vocab_bytes?.[ids[i]];
    const more = hex === undefined ? new TextEncoder().encode(words.vocab[ids[i]] ?? '') : bytesOf(hex);
    // Only bytes in the middle of a character can complete one that has begun.
    if (more.length && ((more[0] & 0xc0) === 0x80) === (i === from)) return null;
    bytes = Uint8Array.from([...bytes, ...more]);
    const text = i === from ? null : decoded(bytes);
    if (text !== null) return { to: i + 1, text };
  }
  return null;
}
