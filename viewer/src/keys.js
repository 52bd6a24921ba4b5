// The keyboard. A component declares its keys as long as it is shown; the latest one comes first. Keys are
// written as they are pressed: `j`, `?`, `ArrowRight`, `Ctrl+Enter`, `Escape`, and `g m` for one after another.
import { signal } from '@preact/signals';
import { useEffect, useRef } from 'preact/hooks';

/**
 * @typedef {object} Binding
 * @property {string} keys
 * @property {string} what it does, for the list of keys and the palette
 * @property {(event: KeyboardEvent | null) => void} run
 * @property {boolean} [inText] whether it works while a text is being typed
 *
 * @typedef {{title: string, bindings: () => Binding[]}} Layer
 */

/** @type {import('@preact/signals').Signal<Layer[]>} */
export const layers = signal([]);
/** The first key of a sequence, while its second is waited for. */
export const pending = signal('');
const WAIT = 1200; // milliseconds for the second key
let timer = 0;

/** @param {string} title @param {Binding[]} bindings */
export function useKeys(title, bindings) {
  const latest = useRef(bindings);
  latest.current = bindings;
  useEffect(() => {
    const layer = { title, bindings: () => latest.current };
    layers.value = [layer, ...layers.peek()];
    return () => {
      layers.value = layers.peek().filter((other) => other !== layer);
    };
  }, [title]);
}

/** @param {KeyboardEvent} event */
function written(event) {
  const name = event.key === ' ' ? 'Space' : event.key;
  return event.ctrlKey || event.metaKey ? `Ctrl+${name}` : name;
}

/** @param {EventTarget | null} target */
function isText(target) {
  return target instanceof HTMLElement && (target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName));
}

/** @param {KeyboardEvent} event */
function pressed(event) {
  if (event.defaultPrevented || event.altKey || event.isComposing) return;
  if (document.querySelector('dialog[open]')) return; // a dialog has keys of its own
  const key = written(event);
  const sequence = pending.peek() ? `${pending.peek()} ${key}` : key;
  pending.value = '';
  const all = layers.peek().flatMap((layer) => layer.bindings());
  const inText = isText(event.target);
  const found = all.find((binding) => binding.keys === sequence && (!inText || binding.inText));
  if (found) {
    event.preventDefault();
    found.run(event);
  } else if (!inText && all.some((binding) => binding.keys.startsWith(`${sequence} `))) {
    event.preventDefault();
    pending.value = sequence;
    clearTimeout(timer);
    timer = setTimeout(() => (pending.value = ''), WAIT);
  }
}

/** Listen to the keyboard. Called once. */
export function startKeys() {
  addEventListener('keydown', pressed);
}

/** Move the focus along elements. @param {string} selector @param {number} direction */
export function walk(selector, direction) {
  const all = /** @type {HTMLElement[]} */ ([...document.querySelectorAll(selector)]);
  const at = all.indexOf(/** @type {HTMLElement} */ (document.activeElement));
  const next = all[at < 0 ? (direction > 0 ? 0 : all.length - 1) : Math.min(Math.max(at + direction, 0), all.length - 1)];
  next?.focus();
  next?.scrollIntoView({ block: 'nearest' });
}

const GLYPHS = /** @type {Record<string, string>} */ ({
  ArrowLeft: '←', ArrowRight: '→', ArrowUp: '↑', ArrowDown: '↓', Escape: 'Esc',
});

/** A key as people read it. @param {string} keys @returns {string[]} */
export function shownKeys(keys) {
  return keys.split(/[ +]/).map((key) => GLYPHS[key] ?? key);
}
