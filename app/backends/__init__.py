"""Small applications beside the API: two services behind the gateway, and the outside world that tasks call."""
