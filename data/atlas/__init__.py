"""The embedded world: real facts about countries, cities, elements -> passages and 1-3 hop questions."""
