"""The head atlas: what every head of a model looks at, recorded, stored, drawn, and turned into roles."""
