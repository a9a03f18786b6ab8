-- Put held messages back where they came from, to be taken next.
--
-- KEYS  held messages, attempts
-- ARGV  lifetime of the attempts in s, then fields, the first one to be taken first
-- Returns how many were put back: one that was reclaimed meanwhile is not.
local held, attempts = KEYS[1], KEYS[2]
local count = 0
for at = #ARGV, 2, -1 do
  local field = ARGV[at]
  local payload = redis.call('HGET', held, field)
  if payload then
    redis.call('HDEL', held, field)
    redis.call('RPUSH', string.match(field, '^%d+:%d+:(.*)$'), payload)
    redis.call('HINCRBY', attempts, redis.sha1hex(payload), 1)
    count = count + 1
  end
end
if count > 0 then
  redis.call('EXPIRE', attempts, ARGV[1])
end
return count
