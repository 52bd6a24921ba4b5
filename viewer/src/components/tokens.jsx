// Tokens with their activations: the background says how strong (orange above 0, blue below), so does the
// thickness of the underline, and the exact value is given on hover and focus.
import { useMemo, useRef } from 'preact/hooks';
import { byteText, fixed, number } from '../format.js';
import { pieces } from '../vocabulary.js';
import { hideTip, showTip } from './tip.js';

/** @typedef {import('../vocabulary.js').Vocabulary} Vocabulary */
/** @typedef {[number, number][]} Sparse positions and values */

export const LEVELS = 9;

/** The step of a highlight, from 0 to 9 and from 0 to −9. @param {number} value @param {number} scale */
export function level(value, scale) {
  const share = scale > 0 ? value / scale : 0;
  const size = Math.abs(share);
  if (size < 0.05) return 0;
  return Math.sign(share) * Math.min(LEVELS, Math.max(1, Math.ceil(size * LEVELS - 1e-9)));
}

/** @param {number} step */
export function levelClass(step) {
  return step === 0 ? '' : step > 0 ? ` p${step}` : ` n${-step}`;
}

/** @param {Sparse} acts @param {number} n */
export function dense(acts, n) {
  const values = new Float64Array(n);
  for (const [at, value] of acts) if (at < n) values[at] = value;
  return values;
}

/** The largest by size. @param {Float64Array} values @param {number} from @param {number} to */
function strongest(values, from, to) {
  let best = from;
  for (let i = from + 1; i < to; i++) if (Math.abs(values[i]) > Math.abs(values[best])) best = i;
  return best;
}

/**
 * @typedef {object} TokensProps
 * @property {number[]} ids
 * @property {Vocabulary} words
 * @property {Sparse} [acts]
 * @property {Float64Array} [values] one for each token; instead of acts
 * @property {number} scale the value that is highlighted most strongly
 * @property {number} [peak] the token that is set in bold
 * @property {string} label what a screen reader calls it
 * @property {number} [from] first token shown
 * @property {number} [to] end of the tokens shown
 * @property {(token: number) => void} [onPick] what happens when a token is chosen
 * @property {number} [picked] the token that was chosen
 * @property {(token: number) => string[]} [more] further lines beside a token
 * @property {boolean} [still] no stop of the keyboard: for lists with a link to all of it
 */

/** @param {TokensProps} props */
export function Tokens({ ids, words, acts, values, scale, peak, label, from = 0, to = ids.length, onPick, picked, more, still = false }) {
  const all = useMemo(() => pieces(ids, words), [ids, words]);
  const filled = useMemo(() => values ?? dense(acts ?? [], ids.length), [values, acts, ids]);
  const at = useRef(-1);
  const shown = all.filter((piece) => piece.to > from && piece.from < to);

  /** @param {Element} box @param {number} i */
  function tip(box, i) {
    const element = box.querySelector(`[data-i="${i}"]`);
    const piece = shown[i];
    if (element && piece) showTip(element, tipLines(piece, ids, words, filled, more));
  }
  /** @param {Event} event */
  const indexOf = (event) => {
    const found = event.target instanceof Element ? event.target.closest('[data-i]') : null;
    return found ? Number(found.getAttribute('data-i')) : -1;
  };
  /** @param {import('preact').TargetedKeyboardEvent<HTMLElement>} event */
  function onKeyDown(event) {
    const step = event.key === 'h' ? -1 : event.key === 'l' ? 1 : 0;
    if (step) {
      at.current = Math.min(Math.max(at.current + step, 0), shown.length - 1);
      tip(event.currentTarget, at.current);
      event.preventDefault();
    } else if (event.key === ' ' && onPick && shown[at.current]) {
      onPick(strongest(filled, shown[at.current].from, shown[at.current].to));
      event.preventDefault();
    }
  }
  return (
    <div
      class={`tokens${onPick ? ' pick' : ''}`}
      role="group"
      tabIndex={still ? undefined : 0}
      aria-label={label}
      onMouseOver={(event) => indexOf(event) >= 0 && tip(event.currentTarget, indexOf(event))}
      onMouseLeave={hideTip}
      onFocus={(event) => {
        at.current = Math.max(0, shown.findIndex((piece) => peak !== undefined && peak >= piece.from && peak < piece.to));
        if (event.currentTarget.matches(':focus-visible')) tip(event.currentTarget, at.current);
      }}
      onBlur={hideTip}
      onClick={(event) => {
        const i = indexOf(event);
        if (onPick && i >= 0) onPick(strongest(filled, shown[i].from, shown[i].to));
      }}
      onKeyDown={onKeyDown}
    >
      {from > 0 && <span class="cut">…</span>}
      {shown.map((piece, i) => {
        const value = filled[strongest(filled, piece.from, piece.to)];
        const isPeak = peak !== undefined && peak >= piece.from && peak < piece.to;
        const isPicked = picked !== undefined && picked >= piece.from && picked < piece.to;
        const step = level(value, scale);
        // The space of a highlighted word goes to the next line with it.
        const glued = step !== 0 && piece.text.startsWith(' ');
        const shownToken = (
          <span
            data-i={i}
            data-value={value || undefined}
            class={`t${glued ? ' glued' : ''}${levelClass(step)}${isPeak ? ' peak' : ''}${isPicked ? ' picked' : ''}`}
          >
            {piece.text}
          </span>
        );
        return glued ? <><wbr />{shownToken}</> : shownToken;
      })}
      {to < ids.length && <span class="cut">…</span>}
    </div>
  );
}

/**
 * @param {import('../vocabulary.js').Piece} piece @param {number[]} ids @param {Vocabulary} words
 * @param {Float64Array} values @param {((token: number) => string[]) | undefined} more
 */
function tipLines(piece, ids, words, values, more) {
  const lines = [fixed(values[strongest(values, piece.from, piece.to)])];
  for (let i = piece.from; i < piece.to; i++) {
    const hex = words.vocab_bytes?.[ids[i]];
    const text = hex ? byteText(Uint8Array.from(hex.match(/../g) ?? [], (p) => parseInt(p, 16))) : JSON.stringify(words.vocab[ids[i]] ?? '');
    lines.push(`${text}  token ${ids[i]}${piece.to - piece.from > 1 ? `  ${number(values[i])}` : ''}`);
  }
  return [...lines, ...(more?.(piece.from) ?? [])];
}

/** The scale of highlights, from the lowest to the highest value. @param {{scale: number, signed?: boolean}} props */
export function Scale({ scale, signed = false }) {
  const steps = Array.from({ length: LEVELS }, (_, i) => i + 1);
  return (
    <span class="scale">
      {signed && <span>{number(-scale)}</span>}
      {signed && <span class="swatches">{steps.map((step) => <i class={`n${LEVELS + 1 - step}`} />)}</span>}
      <span>0</span>
      <span class="swatches">{steps.map((step) => <i class={`p${step}`} />)}</span>
      <span>{number(scale)}</span>
    </span>
  );
}

/** One token in running text or a table. @param {{text: string}} props */
export function Word({ text }) {
  return <code class="word">{text}</code>;
}
