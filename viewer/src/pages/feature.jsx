export function FeaturePage() { return null; }
export function ComparePage() { return null; }
