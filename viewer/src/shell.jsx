// The frame around all pages: rail, status bar, search, list of keys, notices.
import { useSignal } from '@preact/signals';
import { useEffect, useRef } from 'preact/hooks';
import { traffic } from './api.js';
import { Dialog } from './components/dialog.jsx';
import { Icon } from './components/icons.jsx';
import { copy } from './components/notice.js';
import { Notices } from './components/notices.jsx';
import { Tool } from './components/panel.jsx';
import { Failure } from './components/states.jsx';
import { fixed, plural } from './format.js';
import { layers, pending, shownKeys, useKeys } from './keys.js';
import { Astray } from './pages/astray.jsx';
import { Palette } from './palette.jsx';
import { go, href, route } from './router.js';
import { PAGES } from './routes.js';
import { health, model, modelProblem, modelState, refresh, theme, tray } from './state.js';

const THEMES = /** @type {const} */ (['auto', 'light', 'dark']);

export function Shell() {
  const window = useSignal(/** @type {'' | 'search' | 'commands' | 'keys'} */ (''));
  const { path, query } = route.value;
  const page = PAGES.find((one) => one.path === (path[0] ?? ''));
  useKeys('Everywhere', [
    { keys: '/', what: 'Search features', run: () => (window.value = 'search') },
    { keys: '.', what: 'Commands', run: () => (window.value = 'commands') },
    { keys: '?', what: 'This list of keys', run: () => (window.value = 'keys') },
    { keys: 'y', what: 'Copy a link to this page', run: () => copy(location.href, 'Link') },
    { keys: 'm', what: 'Maximise the panel with the focus or the pointer', run: () => tool('large') },
    { keys: 'Escape', what: 'Close, or leave a field', inText: true, run: leave },
    ...PAGES.filter((one) => one.keys).map((one) => ({
      keys: /** @type {string} */ (one.keys),
      what: `Go to ${one.title}`,
      run: () => go(href([one.path])),
    })),
  ]);
  useScrollTo(path.join('/'), query.at);
  const of = path.slice(1).join(' / ');
  useEffect(() => {
    document.title = [of || page?.title, 'neuron_explainer'].filter(Boolean).join(' · ');
  }, [page, of]);
  /** A window's event "close" comes late: another may be open by then. @param {'search' | 'commands' | 'keys'} name */
  const close = (name) => () => void (window.value === name && (window.value = ''));
  return (
    <div class="shell">
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); document.getElementById('main')?.focus(); }}>Skip to the page</a>
      <Rail here={path[0] ?? ''} onSearch={() => (window.value = 'search')} onKeys={() => (window.value = 'keys')} />
      <main id="main" tabIndex={-1}>
        <Banner />
        {page ? <page.component key={page.path} path={path.slice(1)} query={query} /> : <Unknown />}
      </main>
      <StatusBar />
      {window.value === 'search' && <Palette mode="search" onClose={close('search')} />}
      {window.value === 'commands' && <Palette mode="commands" onClose={close('commands')} />}
      {window.value === 'keys' && <Keys onClose={close('keys')} />}
      <Notices />
    </div>
  );
}

/** Press a tool of the panel that has the focus or the pointer, or of the first one. @param {string} name */
function tool(name) {
  const panel = document.activeElement?.closest('.panel') ?? document.querySelector('.panel:hover') ?? document.querySelector('.panel');
  const button = panel?.querySelector(`[data-tool="${name}"]`);
  if (button instanceof HTMLElement) button.click();
}

function leave() {
  if (document.activeElement instanceof HTMLElement) document.activeElement.blur();
}

/** Start a new page at its top, or at the panel that a link names. @param {string} path @param {string | undefined} panel */
function useScrollTo(path, panel) {
  const [page, dictionary] = path.split('/');
  const before = useRef(page);
  useEffect(() => {
    // Steps from unit to unit keep the place; another page begins at its top.
    if (before.current !== page) {
      scrollTo(0, 0);
      document.getElementById('main')?.focus({ preventScroll: true }); // the keyboard begins there, too
    }
    before.current = page;
  }, [page, dictionary]);
  useEffect(() => {
    if (!panel) return;
    // The panel may have to wait for its data.
    const timer = setInterval(() => {
      const found = document.getElementById(`panel-${panel}`);
      if (found) found.scrollIntoView({ block: 'start' });
      if (found || tries++ > 20) clearInterval(timer);
    }, 100);
    let tries = 0;
    return () => clearInterval(timer);
  }, [path, panel]);
}

/** @param {{here: string, onSearch: () => void, onKeys: () => void}} props */
function Rail({ here, onSearch, onKeys }) {
  const next = THEMES[(THEMES.indexOf(theme.value) + 1) % THEMES.length];
  return (
    <nav class="rail" aria-label="Pages">
      <a class="brand" href="#/">
        <svg viewBox="0 0 24 24" width="22" height="22" aria-hidden="true"><path d="M4 19V9M9 19v-4M14 19V5M19 19v-8" /></svg>
        <span>neuron explainer</span>
      </a>
      <button type="button" class="find" onClick={onSearch}>
        <Icon name="search" /><span>Search</span><kbd>/</kbd>
      </button>
      <ul>
        {PAGES.filter((page) => page.rail).map((page) => (
          <li>
            <a href={href([page.path])} aria-current={page.path === here ? 'page' : undefined}>
              <Icon name={page.icon} /><span>{page.title}</span>
              {page.path === 'compare' && tray.value.length > 0 && <span class="count">{tray.value.length}</span>}
            </a>
          </li>
        ))}
      </ul>
      <div class="rail-foot">
        <Tool icon={theme.value === 'dark' ? 'moon' : theme.value === 'light' ? 'sun' : 'auto'} label={`Colours: ${theme.value}; change to ${next}`} onClick={() => (theme.value = next)} />
        <Tool icon="help" label="Keys" keys="?" onClick={onKeys} />
      </div>
    </nav>
  );
}

/** What is wrong with the server as a whole. */
function Banner() {
  const problem = modelProblem.value;
  if (problem) return <div class="banner"><Failure problem={problem} retry={refresh} /></div>;
  if (modelState.value === 'failed')
    return <div class="banner"><p role="alert">The model could not be loaded: {model.value?.error ?? 'the server has written why'}. What the stores hold can be read.</p></div>;
  return null;
}

function Unknown() {
  return (
    <div class="page">
      <Astray title="There is no such page" why="The address may be of another version. These are the pages:" places={PAGES.filter((one) => one.rail).map((one) => [one.title, href([one.path])])} />
    </div>
  );
}

const STATES = /** @type {Record<string, string>} */ ({
  none: 'no model', loading: 'loading the model', ready: 'model ready', failed: 'model failed',
});

function StatusBar() {
  const { inFlight, lastMs, online } = traffic.value;
  const state = online ? modelState.value : 'offline';
  const queue = health.value?.queue_depth ?? 0;
  return (
    <footer class="status" aria-label="State of the server">
      <span class={`dot ${state}`} aria-hidden="true" />
      <span>{online ? STATES[modelState.value] ?? modelState.value : 'no connection'}</span>
      {model.value?.name && <span class="wide">{model.value.name}</span>}
      {model.value?.device && <span class="wide">{model.value.device}{model.value.dtype ? `, ${model.value.dtype}` : ''}</span>}
      {queue > 0 && <span>{plural(queue, 'request')} waiting</span>}
      <span class="push">{pending.value && <>{shownKeys(pending.value).map((key) => <kbd>{key}</kbd>)} …</>}</span>
      <span class="wide ms">{inFlight > 0 ? 'asking …' : lastMs === null ? '' : `${fixed(lastMs, 0)} ms`}</span>
    </footer>
  );
}

/** @param {{onClose: () => void}} props */
function Keys({ onClose }) {
  return (
    <Dialog title="Keys" onClose={onClose} class="keys">
      <div class="columns">
        {[...layers.value].map((layer) => (
          <section>
            <h3>{layer.title}</h3>
            <dl>
              {layer.bindings().map((binding) => (
                <div><dt>{shownKeys(binding.keys).map((key) => <kbd>{key}</kbd>)}</dt><dd>{binding.what}</dd></div>
              ))}
            </dl>
          </section>
        ))}
        <section>
          <h3>In a run of tokens</h3>
          <dl>
            <div><dt><kbd>h</kbd><kbd>l</kbd></dt><dd>Token before, token after, with its value</dd></div>
            <div><dt><kbd>Space</kbd></dt><dd>Choose the token, where that does something</dd></div>
          </dl>
        </section>
      </div>
    </Dialog>
  );
}
