"""What quantizing the kept keys and values costs in accuracy and saves in bytes, on the small trained model."""
