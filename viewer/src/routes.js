// The pages. A page is a component in pages/ and a line here: its address is `#/{path}/…`. What a newcomer sees
// first is part of the first download; the others stand in pages/more.js and are loaded when they are opened.
import { DictionariesPage, DictionaryPage } from './pages/dictionary.jsx';
import { ComparePage, FeaturePage } from './pages/feature.jsx';
import { HomePage } from './pages/home.jsx';
import { later } from './pages/later.jsx';

/**
 * @typedef {object} Page
 * @property {string} path first part of the address
 * @property {string} title
 * @property {import('./components/icons.jsx').IconName} icon
 * @property {(props: {path: string[], query: Record<string, string>}) => any} component `path` is the rest of the address
 * @property {boolean} [rail] whether it stands in the rail
 * @property {string} [keys] what opens it
 */

/** @type {Page[]} */
export const PAGES = [
  { path: '', title: 'Start', icon: 'feature', component: HomePage },
  { path: 'f', title: 'Features', icon: 'feature', component: FeaturePage, rail: true, keys: 'g f' },
  { path: 'd', title: 'Dictionaries', icon: 'grid', component: Dictionaries, rail: true, keys: 'g d' },
  { path: 'm', title: 'Model', icon: 'model', component: later('ModelPage'), rail: true, keys: 'g m' },
  { path: 'p', title: 'Prompt', icon: 'prompt', component: later('PromptPage'), rail: true, keys: 'g p' },
  { path: 'h', title: 'Heads', icon: 'head', component: later('HeadPage'), rail: true, keys: 'g h' },
  { path: 'factors', title: 'Factors', icon: 'factors', component: later('FactorsPage'), rail: true, keys: 'g t' },
  { path: 'compare', title: 'Compare', icon: 'compare', component: ComparePage, rail: true, keys: 'g c' },
];

/** @param {{path: string[], query: Record<string, string>}} props */
function Dictionaries(props) {
  return props.path.length ? DictionaryPage(props) : DictionariesPage();
}
