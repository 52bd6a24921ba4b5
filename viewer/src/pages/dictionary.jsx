export function DictionariesPage() { return null; }
/** @param {{path: string[], query: Record<string, string>}} _props */
export function DictionaryPage(_props) { return null; }
