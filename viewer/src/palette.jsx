// The search box (`/`) over the features of all dictionaries, and the list of commands (`.`).
import { useMemo, useRef, useState } from 'preact/hooks';
import { url, useGet } from './api.js';
import { Dialog } from './components/dialog.jsx';
import { Failure } from './components/states.jsx';
import { visible } from './format.js';
import { layers, shownKeys } from './keys.js';
import { go, href, route } from './router.js';
import { dictionaries, dictionary } from './state.js';

/** @typedef {{title: string, note: string, keys?: string[], run: () => void}} Item */

/** @param {{mode: 'search' | 'commands', onClose: () => void}} props */
export function Palette({ mode, onClose }) {
  const [text, setText] = useState('');
  const [at, setAt] = useState(0);
  const [kind, setKind] = useState('');
  const list = useRef(/** @type {HTMLUListElement | null} */ (null));
  const search = mode === 'search' && text.trim() !== '';
  const asked = useGet(search ? url(['search'], { q: text.trim().slice(0, 200), mode: kind || 'all', limit: 30 }) : null, { delay: 120 });
  const commands = useMemo(allCommands, []);
  /** @type {Item[]} */
  const items = mode === 'commands' ? commands.filter((item) => matches(item.title, text)) : search ? (asked.data?.items ?? []).map(hit) : places();
  const chosen = Math.min(at, items.length - 1);

  /** @param {Item | undefined} item */
  function choose(item) {
    if (!item) return;
    onClose();
    item.run();
  }
  /** @param {KeyboardEvent} event */
  function onKeyDown(event) {
    const step = event.key === 'ArrowDown' ? 1 : event.key === 'ArrowUp' ? -1 : 0;
    if (step && items.length) {
      const next = (chosen + step + items.length) % items.length;
      setAt(next);
      list.current?.children[next]?.scrollIntoView({ block: 'nearest' });
    } else if (event.key === 'Enter') choose(items[chosen]);
    else return;
    event.preventDefault();
  }
  const label = mode === 'search' ? 'Search features by label, token or number' : 'Commands';
  return (
    <Dialog title={label} onClose={onClose} class="palette" bare>
      <div class="palette-field">
        <input
          type="text" role="combobox" aria-label={label} aria-expanded="true" aria-controls="palette-list" autoComplete="off" spellcheck={false}
          aria-activedescendant={items.length ? `palette-${chosen}` : undefined}
          placeholder={mode === 'search' ? 'Words of a label, a token such as " Paris", or a number' : 'What to do'}
          value={text} maxLength={200} autofocus
          onInput={(event) => { setText(event.currentTarget.value); setAt(0); }} onKeyDown={onKeyDown}
        />
        {mode === 'search' && (
          <select aria-label="Search in" value={kind} onChange={(event) => setKind(event.currentTarget.value)}>
            <option value="">everything</option><option value="label">labels</option><option value="token">tokens</option><option value="id">numbers</option>
          </select>
        )}
      </div>
      <ul id="palette-list" role="listbox" aria-label="Results" ref={list}>
        {items.map((item, i) => (
          <li id={`palette-${i}`} role="option" aria-selected={i === chosen} onMouseMove={() => i !== chosen && setAt(i)} onClick={() => choose(item)}>
            <span class="grow">{item.title}</span>
            {item.note && <span class="soft">{item.note}</span>}
            {item.keys && <span>{item.keys.map((key) => <kbd>{key}</kbd>)}</span>}
          </li>
        ))}
      </ul>
      {search && asked.error && <Failure problem={asked.error} retry={asked.retry} />}
      <p class="palette-foot soft" role="status">{search && !asked.error ? said(asked, items.length) : mode === 'search' ? 'Dictionaries; type to search their features' : ''}</p>
    </Dialog>
  );
}

/** @param {import('./api.js').Asked<any>} asked @param {number} n */
function said(asked, n) {
  if (asked.loading) return 'Searching …';
  return n ? `${n} found` : 'Nothing found. Labels are searched by whole words and the beginning of the last one, tokens by all they write.';
}

/** @param {string} title @param {string} text */
function matches(title, text) {
  const where = title.toLowerCase();
  return text.toLowerCase().split(/\s+/).every((word) => where.includes(word));
}

/** @param {any} found @returns {Item} */
function hit(found) {
  const kind = dictionary(found.dictionary)?.kind ?? 'latent';
  return {
    title: found.label ? visible(found.label) : `${kind} ${found.unit}`,
    note: `${found.dictionary} · ${found.unit}${found.why ? ` · ${found.why}` : ''}`,
    run: () => go(href(['f', found.dictionary, found.unit])),
  };
}

/** @returns {Item[]} */
function places() {
  return dictionaries.value.map((one) => ({
    title: one.name || one.id,
    note: `${one.n} ${one.kind}s of ${one.location}`,
    run: () => go(href(['d', one.id])),
  }));
}

/** What the keys of this page do, as a list. @returns {Item[]} */
function allCommands() {
  const here = route.peek().path[0] ?? '';
  return layers.peek().flatMap((layer) =>
    layer.bindings().filter((binding) => binding.keys !== 'Escape').map((binding) => ({
      title: binding.what,
      note: layer.title === 'Everywhere' ? '' : here ? layer.title : '',
      keys: shownKeys(binding.keys),
      run: () => binding.run(null),
    })),
  );
}
