"""Methods that train few values: entries, rows, scales, or coefficients of a transform."""
