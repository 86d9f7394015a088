"""Steps that go wrong: found before they reach the weights, recorded, left out or gone back from."""
