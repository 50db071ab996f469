"""How the heads are trained: steps, memory, several processes, validation, going on."""
