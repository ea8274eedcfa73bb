"""Hot paths: each one public function, with a plain-torch reference."""
