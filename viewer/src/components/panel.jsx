// A part of a page: a title, one line that says what it is, and the tools that every part has.
import { createContext } from 'preact';
import { useContext, useEffect, useId, useRef, useState } from 'preact/hooks';
import { Icon } from './icons.jsx';
import { copy } from './notice.js';

/** Whether this page has an address that is worth copying. */
export const HasLinks = createContext(true);

/**
 * @typedef {object} PanelProps
 * @property {string} id short, for links to this part (`?at=`)
 * @property {string} title
 * @property {any} [what] one line: what is this?
 * @property {any} [json] what is copied as JSON; a function is called then
 * @property {string | null} [python] a script that gives the same numbers
 * @property {any} [actions] further tools, before the others
 * @property {string} [class]
 * @property {any} children
 */

/** @param {PanelProps} props */
export function Panel({ id, title, what, json, python, actions, class: name = '', children }) {
  const [large, setLarge] = useState(false);
  const heading = useId();
  const links = useContext(HasLinks);
  const box = useRef(/** @type {HTMLElement | null} */ (null));
  useEffect(() => {
    if (!large) return;
    /** @param {KeyboardEvent} event */
    const close = (event) => {
      if (event.key === 'Escape' && !document.querySelector('dialog[open]')) {
        event.preventDefault();
        setLarge(false);
      }
    };
    addEventListener('keydown', close, true);
    document.documentElement.classList.add('has-large');
    return () => {
      removeEventListener('keydown', close, true);
      document.documentElement.classList.remove('has-large');
    };
  }, [large]);
  return (
    <section id={`panel-${id}`} data-panel={id} class={`panel ${name}${large ? ' large' : ''}`} aria-labelledby={heading} ref={box}>
      <header class="panel-head">
        <h2 id={heading}>{title}</h2>
        <div class="tools">
          {actions}
          {json !== undefined && (
            <Tool icon="json" label={`Copy JSON of ${title}`} tool="json" onClick={() => copy(JSON.stringify(typeof json === 'function' ? json() : json, null, 1), 'JSON')} />
          )}
          {python && <Tool icon="python" label={`Copy ${title} as Python`} tool="python" onClick={() => copy(python, 'Python')} />}
          {links && <Tool icon="link" label={`Copy link to ${title}`} tool="link" onClick={() => copy(linkTo(id), 'Link')} />}
          <Tool icon={large ? 'minimise' : 'maximise'} label={large ? `Restore ${title}` : `Maximise ${title}`} tool="large" onClick={() => setLarge(!large)} />
        </div>
        {what && <p class="what">{what}</p>}
      </header>
      <div class="panel-body">{children}</div>
    </section>
  );
}

/** The address of this page that also scrolls to a part of it. @param {string} id */
function linkTo(id) {
  const [base, hash = ''] = location.href.split('#');
  const [path, query = ''] = hash.split('?');
  const params = new URLSearchParams(query);
  params.set('at', id);
  return `${base}#${path}?${params}`;
}

/**
 * A button of one icon.
 * @param {{icon: import('./icons.jsx').IconName, label: string, tool?: string, keys?: string, pressed?: boolean, disabled?: boolean, onClick: () => void}} props
 */
export function Tool({ icon, label, tool, keys, pressed, disabled, onClick }) {
  return (
    <button type="button" class="tool" data-tool={tool} aria-label={label} aria-pressed={pressed} disabled={disabled} title={keys ? `${label} (${keys})` : label} onClick={onClick}>
      <Icon name={icon} />
    </button>
  );
}
