// What all pages share: what the server says about the model, the theme, bookmarks, and the compare tray.
import { computed, effect, signal } from '@preact/signals';
import { Problem, get, traffic, url } from './api.js';

/**
 * @typedef {{
 *   id: string, name: string, kind: string, location: string, layer: number, site: string, n: number, n_alive: number,
 *   n_dead: number, n_dense: number, signed: boolean, has_autoencoder: boolean, metrics: any,
 * }} DictionarySummary
 */

/** The reply of `/model`; null until it is there. */
export const model = signal(/** @type {any} */ (null));
export const modelProblem = signal(/** @type {Problem | null} */ (null));
/** The reply of `/health`. */
export const health = signal(/** @type {any} */ (null));

/** @type {import('@preact/signals').ReadonlySignal<DictionarySummary[]>} */
export const dictionaries = computed(() => model.value?.dictionaries ?? []);

/** @param {string} id @returns {DictionarySummary | undefined} */
export function dictionary(id) {
  return dictionaries.value.find((one) => one.id === id);
}

/** Whether the model can be asked now: none, loading, ready or failed. */
export const modelState = computed(() => health.value?.model_state ?? model.value?.state ?? 'loading');

let timer = 0;
/** Ask how the server is; often while its model loads, seldom afterwards. */
async function poll() {
  clearTimeout(timer);
  try {
    const before = modelState.peek();
    health.value = await get(url(['health']));
    if (model.peek() === null || before !== modelState.peek()) model.value = await get(url(['model']));
    if (modelProblem.peek()) dispatchEvent(new Event('nx-back')); // what failed meanwhile is asked for again
    modelProblem.value = null;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    modelProblem.value = error;
  }
  const soon = modelState.peek() === 'loading' || modelProblem.peek() !== null;
  timer = setTimeout(poll, document.hidden ? 30_000 : soon ? 1_500 : 10_000);
}

const offline = computed(() => !traffic.value.online);

/** Called once. */
export function startState() {
  poll();
  effect(() => void (offline.value && setTimeout(poll))); // the first request that fails says so for all
  document.addEventListener('visibilitychange', () => document.hidden || poll());
}

/** Ask again at once. */
export const refresh = poll;

// --- kept in this browser ---

/** @template T @param {string} name @param {T} otherwise */
function remembered(name, otherwise) {
  const key = `neuron_explainer.${name}`;
  let first = otherwise;
  try {
    first = JSON.parse(localStorage.getItem(key) ?? 'null') ?? otherwise;
  } catch {
    // no storage, or another program's text: the default
  }
  const found = signal(first);
  effect(() => {
    const text = JSON.stringify(found.value);
    try {
      localStorage.setItem(key, text);
    } catch {
      // it is forgotten with the page
    }
  });
  return found;
}

/** @typedef {'auto' | 'light' | 'dark'} Theme */
export const theme = remembered('theme', /** @type {Theme} */ ('auto'));
effect(() => {
  document.documentElement.dataset.theme = theme.value;
});

export const MOST_COMPARED = 6;
/** Units side by side. */
export const tray = remembered('tray', /** @type {{dictionary: string, unit: number}[]} */ ([]));

/** @param {string} id @param {number} unit */
export function inTray(id, unit) {
  return tray.value.some((one) => one.dictionary === id && one.unit === unit);
}

/** Put a unit into the tray, or take it out. @param {string} id @param {number} unit @returns {boolean} whether there was room */
export function toggleTray(id, unit) {
  if (inTray(id, unit)) tray.value = tray.value.filter((one) => one.dictionary !== id || one.unit !== unit);
  else if (tray.value.length >= MOST_COMPARED) return false;
  else tray.value = [...tray.value, { dictionary: id, unit }];
  return true;
}
