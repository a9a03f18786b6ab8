-- Put back what dead workers held: those registered whose sign of life has expired.
--
-- KEYS  set of workers, attempts
-- ARGV  keys of signs of life and of held messages without the worker, lifetime of attempts in s
-- Returns worker and number of messages of each dead one, in one flat array.
local workers, attempts = KEYS[1], KEYS[2]
local reclaimed = {}
for _, worker in ipairs(redis.call('SMEMBERS', workers)) do
  if redis.call('EXISTS', ARGV[1] .. worker) == 0 then
    local held = ARGV[2] .. worker
    local found = {}
    local flat = redis.call('HGETALL', held)
    for at = 1, #flat, 2 do
      local take, number, list = string.match(flat[at], '^(%d+):(%d+):(.*)$')
      found[#found + 1] = {tonumber(take), tonumber(number), list, flat[at + 1]}
    end
    -- the one taken first is pushed last, to be taken first again
    table.sort(found, function(a, b)
      if a[1] ~= b[1] then return a[1] > b[1] end
      return a[2] > b[2]
    end)
    for _, message in ipairs(found) do
      redis.call('RPUSH', message[3], message[4])
      redis.call('HINCRBY', attempts, redis.sha1hex(message[4]), 1)
    end
    if #found > 0 then redis.call('EXPIRE', attempts, ARGV[3]) end
    redis.call('DEL', held)
    redis.call('SREM', workers, worker)
    reclaimed[#reclaimed + 1] = worker
    reclaimed[#reclaimed + 1] = #found
  end
end
return reclaimed
