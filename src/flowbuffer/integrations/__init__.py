"""Objects that training frameworks take, one module for each framework, which needs to be there."""
