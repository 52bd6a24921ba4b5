// The pages that are loaded when they are first opened.
export { PromptPage } from './prompt.jsx';
export { ModelPage } from './model.jsx';
