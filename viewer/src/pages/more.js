// The pages that are loaded when they are first opened.
export { PromptPage } from './prompt.jsx';
export { ModelPage } from './model.jsx';
export { HeadPage } from './head.jsx';
export { FactorsPage } from './factors.jsx';
