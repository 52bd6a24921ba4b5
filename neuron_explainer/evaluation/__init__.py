"""What an autoencoder is worth: metrics, spliced passes, figures. Nothing is trained here."""
