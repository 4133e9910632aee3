"""What `maelstream pack` and `maelstream index` share: their options, and how they run a build."""
