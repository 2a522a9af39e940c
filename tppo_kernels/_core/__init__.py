"""The door and the switch: checks of arguments, raw ops, the choice of backend."""
