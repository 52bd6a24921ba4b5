// What stands in place of a page whose address names nothing: plain words, and links to what there is.
import { Failure, Loading } from '../components/states.jsx';
import { visible } from '../format.js';
import { href } from '../router.js';
import { dictionaries, dictionary, model } from '../state.js';

const MOST = 60; // links

/**
 * @param {{title: string, why?: any, places?: [string, string][], heading?: 'h1' | 'p', children?: any}} props
 * places: texts and addresses
 */
export function Astray({ title, why, places = [], heading: Heading = 'h1', children }) {
  return (
    <div class="empty astray">
      <Heading class="empty-title">{visible(title)}</Heading>
      <div class="empty-more">
        {why && <p>{why}</p>}
        {places.length > 0 && <p class="row">{places.slice(0, MOST).map(([text, address]) => <a class="button" href={address}>{text}</a>)}</p>}
        {children}
      </div>
    </div>
  );
}

/** Whether the server says that the address names nothing, rather than that it cannot answer now. @param {import('../api.js').Problem} problem */
export function isAstray({ status, loc }) {
  return status === 404 || (status === 422 && loc?.[0] === 'path');
}

/** @param {{id: string, unit?: string | number, page?: 'd' | 'f', heading?: 'h1' | 'p'}} props page: what the links open */
export function NoUnit({ id, unit, page = 'f', heading }) {
  if (!model.value) return <Loading lines={4} />;
  const one = dictionary(id);
  if (!one || unit === undefined)
    return <Astray heading={heading} title={`There is no dictionary called ${id}`} why={dictionaries.value.length ? 'This server has these:' : 'This server has none.'} places={dictionaries.value.map((other) => [other.name, href([page, other.id])])} />;
  return (
    <Astray
      heading={heading} title={`${one.name} has no ${one.kind} ${unit}`} why={`Its ${one.kind}s are 0 to ${one.n - 1}.`}
      places={[[`${one.kind} 0`, href(['f', id, 0])], [`${one.kind} ${one.n - 1}`, href(['f', id, one.n - 1])], ['Table of all', href(['d', id])]]}
    />
  );
}

/** Why a unit or dictionary cannot be shown. @param {{problem: import('../api.js').Problem, retry: () => void} & Parameters<typeof NoUnit>[0]} props */
export function NotShown({ problem, retry, ...named }) {
  return isAstray(problem) ? <NoUnit {...named} /> : <Failure problem={problem} retry={retry} />;
}
