"""How many replicas the load asks for."""
