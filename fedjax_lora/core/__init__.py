"""What every other part stands on: types, records of methods, keys, trees, units. It knows no method."""
