"""What tests share: the oracle, tables of methods and layers, small models, and checks over all of them."""
