import { render } from 'preact';
import { startKeys } from './keys.js';
import { startRouter } from './router.js';
import { Shell } from './shell.jsx';
import { startState } from './state.js';

startRouter();
startKeys();
startState();
render(<Shell />, /** @type {HTMLElement} */ (document.getElementById('app')));
