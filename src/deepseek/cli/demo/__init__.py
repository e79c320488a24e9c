"""The main job, start to end: steps, each a function from the demo's state to a section."""
