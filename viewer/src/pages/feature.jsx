// `#/f/{dictionary}/{unit}`: everything about one unit.
import { useEffect, useRef, useState } from 'preact/hooks';
import { forget, get, send, url, useGet } from '../api.js';
import { notify } from '../components/notice.js';
import { Tool } from '../components/panel.jsx';
import { Empty, Loading } from '../components/states.jsx';
import { Badges, Facts, FeatureCard, titleOf } from '../feature/card.jsx';
import { MOST_LOGITS } from '../feature/side.jsx';
import { Labels } from '../feature/labels.jsx';
import { TryIt } from '../feature/try.jsx';
import { count, visible } from '../format.js';
import { useKeys, walk } from '../keys.js';
import { go, href, route, setQuery, whole } from '../router.js';
import { MOST_COMPARED, dictionaries, dictionary, inTray, model, modelState, toggleTray } from '../state.js';
import { NoUnit, NotShown } from './astray.jsx';

export { ComparePage } from './compare.jsx';

const REST = 120; // milliseconds on a unit before what needs the model is asked for

/** @param {{path: string[], query: Record<string, string>}} props */
export function FeaturePage({ path, query }) {
  const id = path[0] ?? dictionaries.value[0]?.id;
  const unit = whole(path[1]);
  if (!id) return <div class="page">{model.value ? <Empty title="There are no dictionaries here" /> : <Loading lines={8} />}</div>;
  if (!Number.isSafeInteger(unit)) return <div class="page"><NoUnit id={id} unit={path[1]} /></div>;
  return <Feature key={id} id={id} unit={unit} query={query} />;
}

/** @param {string} id @param {number} unit */
const cardAddress = (id, unit) => url(['dictionaries', id, 'features', unit]);

/** @param {{id: string, unit: number, query: Record<string, string>}} props */
function Feature({ id, unit, query }) {
  const address = cardAddress(id, unit);
  const asked = useGet(address);
  /** @type {import('../feature/types.js').Card | undefined} */
  const card = asked.data;
  const here = card?.unit === unit && card.dictionary === id;
  const one = dictionary(id);
  const ready = modelState.value === 'ready' && here;
  const canDirect = ready && card.kind !== 'head';
  const long = query.logits === String(MOST_LOGITS);
  const logits = useGet(canDirect ? `${address}/logits${long ? `?k=${MOST_LOGITS}` : ''}` : null, { delay: REST });
  const neighbours = useGet(canDirect && card.kind === 'latent' && !logits.loading ? `${address}/neighbours` : null, { delay: REST });
  const steps = useSteps(id, here ? card : undefined, query);
  useFeatureKeys(id, unit, here ? card : undefined, steps, query);
  // The page can be read without a mouse from the heading on.
  const heading = useRef(/** @type {HTMLHeadingElement | null} */ (null));
  if (asked.error && !here)
    return (
      <div class="page">
        {one && <Navigation id={id} unit={unit} card={undefined} one={one} steps={steps} query={query} />}
        <NotShown problem={asked.error} retry={asked.retry} id={id} unit={unit} />
      </div>
    );
  return (
    <div class="page">
      <Navigation id={id} unit={unit} card={here ? card : undefined} one={one} steps={steps} query={query} />
      {card ? (
        <div class={here ? undefined : 'stale'} aria-busy={!here}>
          <header class="feature-head">
            <h1 ref={heading} tabIndex={-1}>{titleOf(card)}<Badges badges={card.badges} /></h1>
            <p class="feature-label">{card.labels[0] ? visible(card.labels[0].text) : <span class="soft">no label yet</span>}</p>
            <Facts card={card} />
          </header>
          <FeatureCard
            card={card} state={query} onState={(patch) => setQuery(/** @type {Record<string, string | undefined>} */ (patch))}
            linkTo={(d, u) => href(['f', d, u], kept(query))} logits={modelState.value === 'none' || card.kind === 'head' ? undefined : logits}
            neighbours={modelState.value === 'none' || card.kind !== 'latent' ? undefined : neighbours}
            long={long} onLong={(wanted) => setQuery({ logits: wanted ? MOST_LOGITS : null })}
            promptLink={modelState.value === 'none' ? undefined : (text) => href(['p'], { a: text })}
            first={card.kind !== 'head' && <TryIt id={id} unit={unit} card={card} query={query} />}
            labels={<Labels key={card.unit} id={id} card={card} onChange={() => { forget(address); asked.retry(); }} />}
          />
        </div>
      ) : (
        <Loading lines={12} />
      )}
    </div>
  );
}

/** What of the query goes along to the next unit: not the range of values, which belongs to this one. @param {Record<string, string>} query */
function kept({ group, width, dedupe, logits, try: texts }) {
  return { group, width, dedupe, logits, try: texts };
}

/**
 * Steps to the alive unit before and after. Which one that is stands in the card, so steps that are taken
 * while it is on its way wait for it; no request is sent that nobody will look at.
 * @param {string} id @param {import('../feature/types.js').Card | undefined} card @param {Record<string, string>} query
 */
function useSteps(id, card, query) {
  const waiting = useRef(0);
  /** @param {number} direction */
  function step(direction) {
    // The address may be ahead of what is drawn: a key that is held repeats faster than that.
    if (!card || route.peek().path[2] !== String(card.unit)) {
      waiting.current += direction;
      return;
    }
    const next = direction > 0 ? card.next_alive : card.prev_alive;
    if (next === null) {
      waiting.current = 0;
      notify(direction > 0 ? 'This is the last one that is alive' : 'This is the first one that is alive');
    } else go(href(['f', id, next], kept(query)));
  }
  useEffect(() => {
    if (!card || !waiting.current) return;
    const direction = Math.sign(waiting.current);
    waiting.current -= direction;
    step(direction);
  }, [card]);
  // Once somebody rests here, the neighbours are fetched, so that the next step needs no waiting.
  useEffect(() => {
    if (!card) return;
    const abort = new AbortController();
    const timer = setTimeout(async () => {
      for (const next of [card.next_alive, card.prev_alive])
        if (next !== null) await get(cardAddress(id, next), { signal: abort.signal }).catch(() => null);
    }, 4 * REST);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [card]);
  return step;
}

/** A unit that is alive, by chance. @param {string} id @param {number} n */
async function randomUnit(id, n) {
  const start = Math.floor(Math.random() * n);
  const card = await get(cardAddress(id, start));
  return card.stats.count > 0 ? start : (card.next_alive ?? card.prev_alive ?? start);
}

/**
 * @param {string} id @param {number} unit @param {import('../feature/types.js').Card | undefined} card
 * @param {(direction: number) => void} step @param {Record<string, string>} query
 */
function useFeatureKeys(id, unit, card, step, query) {
  const n = dictionary(id)?.n ?? 0;
  useKeys('Feature', [
    { keys: 'ArrowRight', what: 'Next one that is alive', run: () => step(1) },
    { keys: 'ArrowLeft', what: 'The one before that is alive', run: () => step(-1) },
    { keys: 'ArrowUp', what: 'The same number a layer up (no correspondence)', run: () => layer(1) },
    { keys: 'ArrowDown', what: 'The same number a layer down (no correspondence)', run: () => layer(-1) },
    { keys: 'r', what: 'A random one that is alive', run: () => random() },
    { keys: 'j', what: 'Next example', run: () => walk('.example .tokens', 1) },
    { keys: 'k', what: 'Example before', run: () => walk('.example .tokens', -1) },
    { keys: 'Enter', what: 'Send the example to the Prompt page', run: (event) => sendExample(event) },
    { keys: 't', what: 'Try a text of your own', run: () => document.getElementById('try-text')?.focus() },
    { keys: 'c', what: 'Put it into the compare tray, or take it out', run: () => compare(id, unit) },
    { keys: 'b', what: 'Bookmark it, or remove the bookmark', run: () => card && bookmark(id, unit, card) },
    { keys: 'e', what: 'Edit its label', run: () => /** @type {HTMLElement | null} */ (document.querySelector('[data-edit-label]'))?.click() },
  ]);
  /** @param {number} direction */
  function layer(direction) {
    const next = direction > 0 ? card?.next_layer : card?.prev_layer;
    if (!next) return card && notify(direction > 0 ? 'There is no layer above with a store' : 'There is no layer below with a store');
    const units = dictionary(next)?.n ?? unit + 1;
    go(href(['f', next, Math.min(unit, units - 1)], kept(query)));
    notify('Another layer: units of the same number have nothing to do with each other');
  }
  async function random() {
    if (n) go(href(['f', id, await randomUnit(id, n)], kept(query)));
  }
}

/** @param {KeyboardEvent | null} event */
function sendExample(event) {
  const target = event?.target instanceof HTMLElement ? event.target : null;
  if (target?.matches('a, button, summary')) return target.click();
  const link = target?.closest('.example')?.querySelector('a.send');
  if (link instanceof HTMLAnchorElement) go(/** @type {string} */ (link.getAttribute('href')));
}

/** @param {string} id @param {number} unit */
function compare(id, unit) {
  if (!toggleTray(id, unit)) notify(`The tray holds ${MOST_COMPARED}: take one out first`, 'bad');
  else notify(inTray(id, unit) ? 'Put into the compare tray' : 'Taken out of the compare tray');
}

/** @param {string} id @param {number} unit @param {import('../feature/types.js').Card} card */
async function bookmark(id, unit, card) {
  try {
    if (card.bookmarked) await send('DELETE', url(['bookmarks'], { dictionary: id, unit }));
    else await send('POST', url(['bookmarks']), { body: { dictionary: id, unit } });
    card.bookmarked = !card.bookmarked;
    forget(url(['bookmarks']));
    forget(cardAddress(id, unit));
    notify(card.bookmarked ? 'Bookmarked' : 'Bookmark removed');
  } catch (error) {
    notify(error instanceof Error ? error.message : String(error), 'bad');
  }
}

/**
 * @param {{
 *   id: string, unit: number, card: import('../feature/types.js').Card | undefined, one: import('../state.js').DictionarySummary | undefined,
 *   steps: (direction: number) => void, query: Record<string, string>,
 * }} props
 */
function Navigation({ id, unit, card, one, steps, query }) {
  const [, redraw] = useState(0);
  const n = one?.n ?? 0;
  return (
    <div class="feature-nav">
      <select aria-label="Dictionary" value={id} onChange={(event) => go(href(['f', event.currentTarget.value, 0], kept(query)))}>
        {!one && <option value={id}>{id}</option>}
        {dictionaries.value.map((other) => <option value={other.id}>{other.name}</option>)}
      </select>
      <a class="small" href={href(['d', id])}>table of all</a>
      <form
        class="row" onSubmit={(event) => {
          event.preventDefault();
          const wanted = Number(new FormData(event.currentTarget).get('unit'));
          go(href(['f', id, wanted], kept(query)));
        }}
      >
        <Tool icon="left" label="The one before that is alive" keys="←" disabled={card ? card.prev_alive === null : false} onClick={() => steps(-1)} />
        <input key={unit} name="unit" type="number" min={0} max={n ? n - 1 : undefined} required defaultValue={String(unit)} aria-label="Number" />
        <button type="submit">Go</button>
        <Tool icon="right" label="Next one that is alive" keys="→" disabled={card ? card.next_alive === null : false} onClick={() => steps(1)} />
      </form>
      {n > 0 && <span class="small soft nowrap">of {count(n)}</span>}
      <span class="push row tight">
        <Tool icon="down" label="A layer down (no correspondence)" keys="↓" disabled={!card?.prev_layer} onClick={() => card?.prev_layer && go(href(['f', card.prev_layer, unit], kept(query)))} />
        <Tool icon="up" label="A layer up (no correspondence)" keys="↑" disabled={!card?.next_layer} onClick={() => card?.next_layer && go(href(['f', card.next_layer, unit], kept(query)))} />
        <Tool icon="dice" label="A random one that is alive" keys="r" disabled={!n} onClick={async () => go(href(['f', id, await randomUnit(id, n)], kept(query)))} />
        <Tool icon="compare" label="Compare" keys="c" pressed={inTray(id, unit)} onClick={() => compare(id, unit)} />
        <Tool icon="bookmark" label="Bookmark" keys="b" pressed={!!card?.bookmarked} disabled={!card || model.value?.read_only} onClick={async () => { if (card) await bookmark(id, unit, card); redraw((n) => n + 1); }} />
      </span>
    </div>
  );
}
