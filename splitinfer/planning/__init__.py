"""Which cut of a model suits which machines: costs, memory, ways to cut. Touches no weight and no socket."""
