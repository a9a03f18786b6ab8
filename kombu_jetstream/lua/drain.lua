-- Move messages from the lists to the hash of those on their way to JetStream, and return them.
--
-- Workers leave that hash alone: what is in it may be in JetStream already.
--
-- KEYS  messages on their way, then the lists in their order
-- ARGV  how many, number of this take
-- Returns field and payload of each message, in one flat array.
local way = KEYS[1]
local left = tonumber(ARGV[1])
local moved = {}
local number = 0
for at = 2, #KEYS do
  while left > 0 do
    local payload = redis.call('RPOP', KEYS[at])
    if not payload then break end
    number = number + 1
    left = left - 1
    local field = ARGV[2] .. ':' .. number .. ':' .. KEYS[at]
    redis.call('HSET', way, field, payload)
    moved[#moved + 1] = field
    moved[#moved + 1] = payload
  end
end
return moved
