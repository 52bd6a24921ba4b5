// The line below a node of the table: what it writes, what excites it, where it looks, and what can be done.
import { post, url, useAsk } from '../api.js';
import { copy } from '../components/notice.js';
import { Tool } from '../components/panel.jsx';
import { Answer } from '../components/states.jsx';
import { fixed } from '../format.js';
import { href } from '../router.js';
import { TokenList, TokenWord } from './answer.jsx';
import { nodeName, pageOf, whyNotChanged, whyNotTraced } from './nodes.js';
import { nodeBody } from './state.js';

/** @typedef {import('./nodes.js').Node} Node */
/** @typedef {import('./state.js').Through} Through */

/**
 * @param {{node: Node, request: any, words: any, ids: number[], hasB: boolean,
 *   onChange: (node: Node, action: import('./state.js').Action, everywhere?: boolean) => void,
 *   onTrace: (node: Node, through: Through) => void}} props
 */
export function Detail({ node, request, words, ids, hasB, onChange, onTrace }) {
  const body = { ...request, node: nodeBody(node) };
  const asked = useAsk(JSON.stringify(body), (signal) => post(url(['node']), body, { signal }));
  const noTrace = whyNotTraced(node);
  const noChange = whyNotChanged(node);
  const page = pageOf(node);
  const isHead = node.kind === 'head' || node.kind === 'pair';
  const paired = node.attended !== null && node.attended !== undefined;
  return (
    <div class="node-detail">
      <header class="row">
        <b>{nodeName(node)}</b> <span class="soft">{node.location}, token {node.position ?? `${node.position_b} of B`}{paired ? ` from ${node.attended}` : ''}</span>
        <span class="push" />
        {asked.data?.python && <Tool icon="python" tool="python" label={`Copy ${nodeName(node)} as Python`} onClick={() => copy(asked.data.python, 'Python')} />}
        {page && <a class="button" href={href(page)}>Open {isHead ? 'head' : 'feature'} <kbd>o</kbd></a>}
      </header>
      <div class="row actions" role="group" aria-label={`What to do with ${nodeName(node)}`}>
        {noChange ? <span class="soft">{noChange}</span> : (
          <>
            <button type="button" onClick={() => onChange(node, 'zero')}>Ablate <kbd>a</kbd></button>
            <button type="button" onClick={() => onChange(node, 'zero', true)}>Ablate at every token</button>
            <button type="button" onClick={() => onChange(node, 'mean')}>Mean</button>
            <button type="button" onClick={() => onChange(node, 'scale')}>Scale</button>
            {!isHead && <button type="button" onClick={() => onChange(node, 'set')}>Set</button>}
            {!isHead && <button type="button" onClick={() => onChange(node, 'add', true)}>Steer <kbd>s</kbd></button>}
            {hasB && <button type="button" onClick={() => onChange(node, 'swap')}>Take from B</button>}
          </>
        )}
      </div>
      <div class="row actions" role="group" aria-label={`Trace ${nodeName(node)}`}>
        {noTrace ? <span class="soft">{noTrace}</span> : !isHead ? (
          <button type="button" onClick={() => onTrace(node, null)}>Trace <kbd>t</kbd></button>
        ) : (
          <>
            <span class="soft">Trace through</span>
            <button type="button" onClick={() => onTrace(withTarget(node, asked.data), 'q')}>query</button>
            <button type="button" onClick={() => onTrace(withTarget(node, asked.data), 'k')}>key</button>
            <button type="button" onClick={() => onTrace(withTarget(node, asked.data), 'qk')}>query and key</button>
            <button type="button" onClick={() => onTrace(node, 'v')}>value <kbd>t</kbd></button>
          </>
        )}
      </div>
      <Answer asked={asked} lines={4}>
        {(data) => (
          <div class="lists">
            {data.label && <div class="token-list"><h3>Label</h3><p>{data.label}</p></div>}
            {isHead && data.attends?.to && (
              <div class="token-list">
                <h3>Looks at</h3>
                <ol>{strongest(data.attends.to).map(({ position, value }) => <li><button type="button" class="plain" title="Trace through query and key from here" onClick={() => onTrace({ ...node, attended: position }, 'qk')}><TokenWord id={ids[position]} words={words} /><sub>{position}</sub></button><span class="tabular soft">{fixed(value, 3)}</span></li>)}</ol>
              </div>
            )}
            {data.promotes && <TokenList title="Promotes" items={data.promotes} words={data} />}
            {data.demotes && <TokenList title="Demotes" items={data.demotes} words={data} />}
            {data.excited_by && data.excited_by.length > 0 && <TokenList title="Excited by" items={data.excited_by} words={data} />}
          </div>
        )}
      </Answer>
    </div>
  );
}

/** The tokens that a head looks at most. @param {number[]} weights of each token @param {number} [n] */
function strongest(weights, n = 8) {
  return weights.map((value, position) => ({ position, value })).sort((a, b) => b.value - a.value || a.position - b.position).slice(0, n);
}

/** A head with the token that it looks at most, because a score is of a pair of tokens. @param {Node} node @param {any} data @returns {Node} */
export function withTarget(node, data) {
  if (node.attended !== null && node.attended !== undefined) return node;
  return { ...node, attended: strongest(data?.attends?.to ?? [])[0]?.position ?? 0 };
}
