// The panels beside the examples: how often which value occurs, what is promoted, what is related.
import { TokenBars } from '../components/bars.jsx';
import { Histogram } from '../components/histogram.jsx';
import { Panel } from '../components/panel.jsx';
import { Answer, Empty } from '../components/states.jsx';
import { count, fixed, number, visible } from '../format.js';
import { parseRange } from './examples.jsx';

/** @typedef {import('./types.js').Card} Card */
/** @typedef {import('./types.js').CardState} CardState */
/** @typedef {(dictionary: string, unit: number) => string | undefined} LinkTo */

/** Tokens of the long lists. */
export const MOST_LOGITS = 100;

/** @param {{card: Card, state: CardState, onState: (patch: CardState) => void}} props */
export function Values({ card, state, onState }) {
  return (
    <Panel id="values" title="Activation values" what="how often each value above 0 occurs; choose bars to see their examples" json={card.hist} python={card.python}>
      {card.hist.counts.length ? (
        <Histogram
          bins={card.hist} edges="logarithmic" label="How often each value above 0 occurs" range={parseRange(state.range)}
          onRange={(range) => onState({ range: range ? range.join('..') : undefined })}
        />
      ) : (
        <Empty title="No value above 0" />
      )}
    </Panel>
  );
}

/**
 * What the unit's direction does to the next token.
 * @param {{asked: import('../api.js').Asked<any>, long?: boolean, onLong?: (long: boolean) => void}} props
 * long: a hundred tokens rather than ten
 */
export function Logits({ asked, long = false, onLong }) {
  const data = asked.data;
  return (
    <Panel id="logits" title="Promotes and demotes" what="how much one unit of activation changes each logit, through the last norm" json={data} python={data?.python}
      actions={onLong && data?.top?.length > 0 && <button type="button" class="plain small" aria-pressed={long} onClick={() => onLong(!long)}>{long ? 'show 10' : `show ${MOST_LOGITS}`}</button>}
    >
      <Answer asked={asked} lines={11}>
        {(/** @type {any} */ reply) => <LogitLists reply={reply} n={long ? MOST_LOGITS : 10} />}
      </Answer>
    </Panel>
  );
}

/** @param {{reply: any, n: number}} props */
function LogitLists({ reply, n }) {
  if (!reply.top?.length) return <Empty title="It writes to no logits">{reply.note && <p>{reply.note}</p>}</Empty>;
  const most = Math.max(...[...reply.top, ...reply.bottom].map((/** @type {any} */ item) => Math.abs(item.value)));
  return (
    <>
      <div class={`two${n > 10 ? ' long' : ''}`} tabIndex={n > 10 ? 0 : undefined} role={n > 10 ? 'group' : undefined} aria-label={n > 10 ? 'Tokens it promotes and demotes' : undefined}>
        <TokenBars items={reply.top.slice(0, n)} words={reply} most={most} caption="Promoted" unit="change of the logit" />
        <TokenBars items={reply.bottom.slice(0, n)} words={reply} most={most} caption="Demoted" unit="change of the logit" />
      </div>
      {reply.histogram && (
        <div class="spaced">
          <Histogram bins={reply.histogram} label="How often each change of a logit occurs" signed height={56} />
          <p class="small soft">all tokens{reply.skewness !== undefined && reply.skewness !== null && <>; skewness {number(reply.skewness)}, kurtosis {number(reply.kurtosis)}</>}</p>
        </div>
      )}
      {reply.note && <p class="small soft">{reply.note}</p>}
    </>
  );
}

/** Which input tokens the unit's encoder looks for. @param {{asked: import('../api.js').Asked<any>}} props */
export function Inputs({ asked }) {
  const items = asked.data?.excited_by;
  if (!asked.data || !items?.length) return null;
  const most = Math.max(...items.map((/** @type {any} */ item) => Math.abs(item.value)));
  return (
    <Panel id="inputs" title="Excited by" what="tokens whose embedding alone activates it most" json={items} python={asked.data.python}>
      <TokenBars items={items.slice(0, 10)} words={asked.data} most={most} caption="Input tokens" unit="activation" />
    </Panel>
  );
}

/** @param {{card: Card, linkTo: LinkTo}} props */
export function Partners({ card, linkTo }) {
  return (
    <Panel id="partners" title="Active together" what="units that fire on the same tokens, counted on a sample" json={card.partners} python={card.python}>
      {card.partners.length === 0 ? (
        <Empty title="No partners were counted" />
      ) : (
        <table class="list">
          <thead><tr><th scope="col">{card.kind}</th><th scope="col" class="num">tokens</th><th scope="col" class="num">Jaccard</th><th scope="col" class="num">phi</th><th scope="col" class="num">PMI</th></tr></thead>
          <tbody>
            {card.partners.slice(0, 10).map((partner) => (
              <tr>
                <th scope="row"><Unit link={linkTo(card.dictionary, partner.unit)} unit={partner.unit} label={partner.label} /></th>
                <td class="num">{count(partner.both)}</td><td class="num">{fixed(partner.jaccard, 2)}</td><td class="num">{fixed(partner.phi, 2)}</td><td class="num">{fixed(partner.pmi, 2)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </Panel>
  );
}

/** @param {{asked: import('../api.js').Asked<any>, card: Card, linkTo: LinkTo}} props */
export function Neighbours({ asked, card, linkTo }) {
  return (
    <Panel id="neighbours" title="Similar directions" what="decoder rows with the largest cosine" json={asked.data?.items} python={asked.data?.python}>
      <Answer asked={asked} lines={8}>
        {(/** @type {any} */ reply) =>
          reply.items.length === 0 ? (
            <Empty title="There is nothing to compare with" />
          ) : (
            <table class="list">
              <thead><tr><th scope="col">{card.kind}</th><th scope="col" class="num">cosine</th></tr></thead>
              <tbody>
                {reply.items.slice(0, 10).map((/** @type {any} */ item) => (
                  <tr>
                    <th scope="row">
                      <Unit link={linkTo(item.dictionary, item.unit)} unit={item.unit} label={item.label} place={item.dictionary === card.dictionary ? '' : item.dictionary} />
                    </th>
                    <td class="num">{fixed(item.cosine, 3)}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          )
        }
      </Answer>
    </Panel>
  );
}

/** A unit in a list: its number, and its label if it has one. @param {{link?: string, unit: number, label?: string | null, place?: string}} props */
export function Unit({ link, unit, label, place = '' }) {
  return (
    <>
      {link ? <a href={link}>{unit}</a> : <span>{unit}</span>}
      {(label || place) && <span class="unit-label soft"> {place}{place && label ? ' · ' : ''}{label && visible(label)}</span>}
    </>
  );
}
