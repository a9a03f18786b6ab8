-- Put back what dead workers held: those registered whose sign of life has expired, and did not
-- come back for a while after that was first seen. All signs expire when Redis itself was away for
-- long, and the workers that live need a moment to give the next one.
--
-- KEYS  set of workers, attempts
-- ARGV  keys of signs of life, of held messages and of suspicions without the worker, lifetime of
--       attempts in s, ms from the first suspicion on
-- Returns worker and number of messages of each dead one, in one flat array.
local workers, attempts = KEYS[1], KEYS[2]
local reclaimed = {}

local function is_dead(worker)
  local suspected, waiting = ARGV[3] .. worker, ARGV[3] .. 'fresh.' .. worker
  if redis.call('EXISTS', ARGV[1] .. worker) == 1 then
    redis.call('DEL', suspected)
    return false
  end
  if redis.call('EXISTS', suspected) == 0 then
    redis.call('SET', suspected, 1, 'PX', ARGV[5] * 100)
    redis.call('SET', waiting, 1, 'PX', ARGV[5])
    return false
  end
  return redis.call('EXISTS', waiting) == 0
end

for _, worker in ipairs(redis.call('SMEMBERS', workers)) do
  if is_dead(worker) then
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
    if #found > 0 then redis.call('EXPIRE', attempts, ARGV[4]) end
    redis.call('DEL', held, ARGV[3] .. worker)
    redis.call('SREM', workers, worker)
    reclaimed[#reclaimed + 1] = worker
    reclaimed[#reclaimed + 1] = #found
  end
end
return reclaimed
