// `#/compare?u=dictionary:12,dictionary:40`: up to six units side by side.
import { useEffect } from 'preact/hooks';
import { url, useGet } from '../api.js';
import { TokenBars } from '../components/bars.jsx';
import { Histogram } from '../components/histogram.jsx';
import { Tool } from '../components/panel.jsx';
import { Answer, Empty } from '../components/states.jsx';
import { Tokens } from '../components/tokens.jsx';
import { Badges, titleOf } from '../feature/card.jsx';
import { scaleOf, tokenOfPeak } from '../feature/examples.jsx';
import { number, percentage, visible } from '../format.js';
import { href, route, setQuery } from '../router.js';
import { MOST_COMPARED, modelState, tray } from '../state.js';
import { NotShown } from './astray.jsx';

const UNIT = /^(.+):(\d+)$/;

/** @param {string | undefined} text */
function parseUnits(text) {
  return (text ?? '').split(',').map((part) => UNIT.exec(part)).flatMap((found) => (found ? [{ dictionary: found[1], unit: Number(found[2]) }] : [])).slice(0, MOST_COMPARED);
}

/** @param {{query: Record<string, string>}} props */
export function ComparePage({ query }) {
  const named = query.u !== undefined;
  useEffect(() => {
    if (named) tray.value = parseUnits(query.u);
    else if (tray.value.length && route.peek().path[0] === 'compare') write(tray.value);
  }, [query.u]);
  const units = named ? parseUnits(query.u) : tray.value;
  const odd = (query.u ?? '').split(',').filter((part) => part && !UNIT.test(part));
  return (
    <div class="page wide">
      <h1>Compare</h1>
      {odd.length > 0 && <p class="soft" role="status">Left out: {odd.map((part) => <code>{visible(part)} </code>)}. A unit is named by its dictionary and its number, such as <code>dictionary:12</code>.</p>}
      {units.length === 0 ? (
        <Empty title="Nothing to compare yet">
          <p>On the page of a feature, the key <kbd>c</kbd> puts it here; up to {MOST_COMPARED} stand side by side.</p>
          <p class="row"><a class="button" href={href(['d'])}>All dictionaries</a></p>
        </Empty>
      ) : (
        <ul class="compare">
          {units.map((one) => (
            <Column key={`${one.dictionary}:${one.unit}`} one={one} onDrop={() => write(units.filter((other) => other !== one))} />
          ))}
        </ul>
      )}
    </div>
  );
}

/** @param {{dictionary: string, unit: number}[]} units */
function write(units) {
  setQuery({ u: units.map((one) => `${one.dictionary}:${one.unit}`).join(',') || null });
  if (!units.length) tray.value = [];
}

/** @param {{one: {dictionary: string, unit: number}, onDrop: () => void}} props */
function Column({ one, onDrop }) {
  const address = url(['dictionaries', one.dictionary, 'features', one.unit]);
  const asked = useGet(address);
  const logits = useGet(asked.data && asked.data.kind !== 'head' && modelState.value === 'ready' ? `${address}/logits` : null);
  return (
    <li class="panel">
      <header class="panel-head">
        <h2><a href={href(['f', one.dictionary, one.unit])}>{asked.data ? titleOf(asked.data) : one.unit}</a>{asked.data && <Badges badges={asked.data.badges} />}</h2>
        <Tool icon="close" label={`Take ${one.unit} of ${one.dictionary} out`} onClick={onDrop} />
        <p class="what">{one.dictionary}</p>
      </header>
      <div class="panel-body">
        {asked.error ? <NotShown heading="p" problem={asked.error} retry={asked.retry} id={one.dictionary} unit={one.unit} /> : <Answer asked={asked} lines={14}>{(card) => <Small card={card} />}</Answer>}
        {logits.data?.top && (
          <TokenBars items={logits.data.top.slice(0, 5)} words={logits.data} most={Math.abs(logits.data.top[0]?.value ?? 1)} caption="Promotes" />
        )}
      </div>
    </li>
  );
}

/** @param {{card: import('../feature/types.js').Card}} props */
function Small({ card }) {
  return (
    <>
      <p class="compare-label">{card.labels[0] ? visible(card.labels[0].text) : <span class="soft">no label yet</span>}</p>
      <p class="small soft row"><span>active {percentage(card.stats.density)}</span><span>largest {number(card.stats.max)}</span><span>mean {number(card.stats.mean)}</span></p>
      {card.hist.counts.length > 0 && <Histogram bins={card.hist} edges="logarithmic" label="How often each value above 0 occurs" height={48} />}
      <ol class="example-list">
        {card.examples.filter((example) => example.group === 'top').slice(0, 6).map((example) => {
          const at = tokenOfPeak(example);
          return (
            <li class="example small-example">
              {example.pairs ? (
                <p class="soft">pairs of tokens: see its page</p>
              ) : (
                <Tokens ids={example.ids} acts={example.acts} words={card} scale={scaleOf(card)} peak={example.peak} label={`Example, peak ${number(example.value)}`} from={Math.max(0, at - 12)} to={Math.min(example.ids.length, at + 5)} />
              )}
            </li>
          );
        })}
      </ol>
    </>
  );
}
