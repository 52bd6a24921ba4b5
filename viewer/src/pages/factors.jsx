// `#/factors`: the examples of transformer factors that the server has. `#/factors/{run}/{i}`: in which layers a
// factor is strong, and which words make it so.
import { Fragment } from 'preact';
import { useState } from 'preact/hooks';
import { url, useGet } from '../api.js';
import { Panel, Tool } from '../components/panel.jsx';
import { Answer, Empty, Failure, Loading } from '../components/states.jsx';
import { Scale, Tokens } from '../components/tokens.jsx';
import { count, fixed, number, plural } from '../format.js';
import { useKeys } from '../keys.js';
import { TokenWord } from '../prompt/answer.jsx';
import { go, href, whole } from '../router.js';
import { Astray, isAstray } from './astray.jsx';

const LEVEL_TEXT = /** @type {Record<string, string>} */ ({
  low: 'peaks in the first third of the layers: often the meaning of a word',
  mid: 'peaks in the middle third: often a pattern of the sentence',
  high: 'peaks in the last third: often something of long range',
  silent: 'active nowhere in this text',
});

/** @param {{path: string[], query: Record<string, string>}} props */
export function FactorsPage({ path, query }) {
  if (path[0] === undefined) return <All query={query} />;
  const factor = whole(path[1]);
  return Number.isSafeInteger(factor) ? <Factor key={path[0]} run={path[0]} factor={factor} /> : <NoFactor run={path[0]} factor={path[1]} />;
}

/** @param {{query: Record<string, string>}} props */
function All({ query }) {
  const asked = useGet(url(['factors']));
  const level = query.level ?? '';
  return (
    <div class="page factors-page">
      <h1>Transformer factors</h1>
      <p class="lead soft">Directions that sparse coding finds in the stream of all layers, and the layers in which each is strong.</p>
      <Answer asked={asked} lines={8}>{(data) => data.runs.length === 0 ? (
        <Empty title="This server has no factors">
          <p>Learn them, collect their examples, and serve the folder:</p>
          <pre>neuron-explainer factors learn books --location resid.torso.post_mlp --n-latents 500 --penalty 3 --out run{'\n'}neuron-explainer factors collate run --out examples{'\n'}neuron-explainer serve --factors examples</pre>
        </Empty>
      ) : data.runs.map((/** @type {any} */ run) => (
        <Panel key={run.id} id={`run-${run.id}`} title={run.name} what={`${plural(run.n_factors, 'factor')} in ${count(run.n_tokens)} tokens of ${run.text}`} json={run} python={run.python}>
          <p class="row levels" role="group" aria-label="Where factors peak">
            {['', 'low', 'mid', 'high', 'silent'].map((name) => <button type="button" aria-pressed={level === name} onClick={() => go(href(['factors'], { level: name }), { replace: true })}>{name === '' ? 'all' : name} <span class="soft">{name === '' ? run.n_factors : run.levels[name] ?? 0}</span></button>)}
          </p>
          <div class="scroll-x" tabIndex={0} role="region" aria-label={`Factors of ${run.name}`}>
            <table class="factor-list">
              <thead><tr><th scope="col">Factor</th><th scope="col">Peaks</th><th scope="col">Importance by layer</th><th scope="col" class="num">Highest</th><th scope="col">Strongest on</th></tr></thead>
              <tbody>{run.factors.filter((/** @type {any} */ one) => !level || one.level === level).slice(0, 200).map((/** @type {any} */ one) => (
                <tr>
                  <th scope="row"><a href={href(['factors', run.id, one.factor])}>{one.factor}</a></th><td>{one.level}</td>
                  <td><Spark values={one.importance} /></td><td class="num">{number(Math.max(...one.importance))}</td>
                  <td class="words">{(one.words ?? []).map((/** @type {number} */ id) => <TokenWord id={id} words={data} />)}</td>
                </tr>
              ))}</tbody>
            </table>
          </div>
        </Panel>
      ))}</Answer>
    </div>
  );
}

/** A small curve. @param {{values: number[]}} props */
function Spark({ values }) {
  const most = Math.max(...values, 1e-12);
  const points = values.map((value, i) => `${(4 + (92 * i) / Math.max(1, values.length - 1)).toFixed(1)},${(22 - (20 * value) / most).toFixed(1)}`);
  return <svg class="spark" width="100" height="24" aria-hidden="true"><polyline points={points.join(' ')} /></svg>;
}

/** @param {{run: string, factor: string | number}} props */
function NoFactor({ run, factor }) {
  const asked = useGet(url(['factors']));
  if (asked.error) return <div class="page"><Failure problem={asked.error} retry={asked.retry} /></div>;
  if (!asked.data) return <div class="page"><Loading lines={4} /></div>;
  const { runs } = asked.data;
  const found = runs.find((/** @type {any} */ one) => one.id === run);
  const places = /** @type {[string, string][]} */ ([['All factors', href(['factors'])], ...(found ? [found] : runs).map((/** @type {any} */ one) => [`Factor 0 of ${one.name}`, href(['factors', one.id, 0])])]);
  return <div class="page"><Astray title={found ? `${found.name} has no factor ${factor}` : `There are no factors called ${run}`} why={found ? `Its factors are 0 to ${found.n_factors - 1}.` : 'There are these:'} places={places} /></div>;
}

/** @param {{run: string, factor: number}} props */
function Factor({ run, factor }) {
  const asked = useGet(url(['factors', run, factor]));
  const data = asked.data;
  /** @param {number | null | undefined} next */
  const show = (next) => next !== null && next !== undefined && go(href(['factors', run, next]));
  useKeys('Factor', [
    { keys: 'ArrowRight', what: 'Next factor', run: () => show(data?.next) },
    { keys: 'ArrowLeft', what: 'Factor before', run: () => show(data?.previous) },
  ]);
  if (asked.error && isAstray(asked.error)) return <NoFactor run={run} factor={factor} />;
  return (
    <div class="page factors-page">
      <header class="row">
        <h1>Factor {factor}</h1>
        <span class="push row"><a href={href(['factors'])}>all factors</a>
          <Tool icon="left" label="Factor before" keys="←" disabled={(data?.previous ?? null) === null} onClick={() => show(data?.previous)} />
          <Tool icon="right" label="Next factor" keys="→" disabled={(data?.next ?? null) === null} onClick={() => show(data?.next)} /></span>
      </header>
      <Answer asked={asked} lines={10}>{(found) => <Card data={found} />}</Answer>
    </div>
  );
}

/** @param {{data: any}} props */
function Card({ data }) {
  const peak = data.importance.indexOf(Math.max(...data.importance));
  const [open, setOpen] = useState(() => new Set([peak]));
  return (
    <div class="stack">
      <Panel id="importance" title="Importance" what={`${data.level}: ${LEVEL_TEXT[data.level]}`} json={{ locations: data.locations, importance: data.importance }} python={data.python}>
        <Curve values={data.importance} locations={data.locations} />
      </Panel>
      <Panel id="sentences" title="Sentences" what="the strongest in each layer; the framed token has the score, the colours say which words make it so" json={data.layers} python={data.python}>
        {data.layers.map((/** @type {any} */ layer, /** @type {number} */ i) => (
          <details key={i} open={open.has(i)} onToggle={(event) => { const next = new Set(open); if (event.currentTarget.open) next.add(i); else next.delete(i); setOpen(next); }}>
            <summary><b>{layer.location}</b> <span class="soft">importance {number(data.importance[i])}{layer.examples.length ? '' : ', no examples'}</span></summary>
            {open.has(i) && <ul class="factor-examples">{layer.examples.map((/** @type {any} */ one, /** @type {number} */ j) => <Example key={j} one={one} data={data} />)}</ul>}
          </details>
        ))}
      </Panel>
    </div>
  );
}

/** A sentence; each token's weight says what keeping it adds to the factor. @param {{one: any, data: any}} props */
function Example({ one, data }) {
  const weights = one.saliency;
  const values = Float64Array.from(one.ids.map((/** @type {any} */ _, /** @type {number} */ i) => weights?.[i] ?? 0));
  // The target's own weight is often far larger than all others: it is cut to the largest of theirs.
  const others = Math.max(0.01, ...Array.from(values, (value, i) => (i === one.index ? 0 : Math.abs(value))));
  values[one.index] = Math.sign(values[one.index]) * Math.min(Math.abs(values[one.index]), others);
  return (
    <li class="example" data-score={one.score}>
      <div class="example-value"><span>{number(one.score)}</span>{one.r2 !== null && one.r2 !== undefined && <span class="soft small">R² {fixed(one.r2, 2)}</span>}</div>
      <Tokens ids={one.ids} words={data} values={values} scale={others} peak={one.index} picked={one.index} label={`Sentence, score ${number(one.score)}`} more={(i) => (i === one.index ? ['the score is of this token'] : weights ? [] : ['no saliency yet'])} />
      <div class="example-tools">{weights && <Scale scale={others} signed />}</div>
    </li>
  );
}

/** @param {{values: number[], locations: string[]}} props */
function Curve({ values, locations }) {
  const [width, height, left, bottom] = [640, 200, 52, 34];
  const most = Math.max(...values, 1e-12);
  const x = (/** @type {number} */ i) => left + ((width - left - 16) * (i + 0.5)) / values.length;
  const y = (/** @type {number} */ value) => 12 + (height - bottom - 12) * (1 - value / most);
  const peak = values.indexOf(Math.max(...values));
  return (
    <>
      <svg class="curve" viewBox={`0 0 ${width} ${height}`} role="img" aria-label={`Importance by layer; highest at ${locations[peak]}, ${number(values[peak])}`}>
        {[0, 0.5, 1].map((share) => <Fragment key={share}><line class="rule" x1={left} x2={width - 8} y1={y(share * most)} y2={y(share * most)} /><text x={left - 8} y={y(share * most) + 4} text-anchor="end">{number(share * most)}</text></Fragment>)}
        <polyline points={values.map((value, i) => `${x(i)},${y(value)}`).join(' ')} />
        {values.map((value, i) => <circle key={i} class={i === peak ? 'peak' : ''} cx={x(i)} cy={y(value)} r={i === peak ? 5 : 3.5}><title>{`${locations[i]}: ${number(value)}`}</title></circle>)}
        {locations.map((place, i) => <text key={place} x={x(i)} y={height - 12} text-anchor="middle">{place.split('/')[0]}</text>)}
      </svg>
      <details class="twin"><summary>The same as a table</summary>
        <table><thead><tr><th scope="col">Location</th><th scope="col" class="num">Importance</th></tr></thead><tbody>{values.map((value, i) => <tr><th scope="row">{locations[i]}</th><td class="num" data-value={value}>{number(value)}</td></tr>)}</tbody></table>
      </details>
    </>
  );
}
