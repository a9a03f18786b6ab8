-- Move one message that a plain redis:// worker never acknowledged, unless it did meanwhile.
--
-- KEYS  kombu's hash of unacknowledged messages, its index, messages on their way
-- ARGV  delivery tag, field and payload
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
return 1
