-- Move messages from the lists to the worker's hash of held ones, and return them.
--
-- Atomic: a message is in a list or held by a registered worker, never nowhere. When the lists
-- hold less than asked for, the last command reads them, so that a connection with client-side
-- tracking hears of the next push to any of them.
--
-- KEYS  held messages, sign of life, set of workers, attempts, then the lists in their order
-- ARGV  how many, number of this take, lifetime of the sign of life in ms, worker, number of
--       queues: the lists come step by step, one of each queue
-- Returns field, payload and earlier attempts of each message, in one flat array.
local held, alive, workers, attempts = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local left, width = tonumber(ARGV[1]), tonumber(ARGV[5])
local knows_attempts = redis.call('EXISTS', attempts) == 1
local taken = {}
local number = 0
for first = 5, #KEYS, width do
  -- The lists of one step of priority take turns.
  local lists = {}
  for at = first, first + width - 1 do lists[#lists + 1] = KEYS[at] end
  while left > 0 and #lists > 0 do
    local rest = {}
    for _, list in ipairs(lists) do
      -- kombu pushes at the head and pops at the tail
      local payload = left > 0 and redis.call('RPOP', list)
      if payload then
        rest[#rest + 1] = list
        number = number + 1
        left = left - 1
        local field = ARGV[2] .. ':' .. number .. ':' .. list
        redis.call('HSET', held, field, payload)
        local tries = knows_attempts and redis.call('HGET', attempts, redis.sha1hex(payload))
        taken[#taken + 1] = field
        taken[#taken + 1] = payload
        taken[#taken + 1] = tries or '0'
      end
    end
    lists = rest
  end
end
if number > 0 then
  redis.call('SADD', workers, ARGV[4])
  redis.call('SET', alive, '1', 'PX', ARGV[3])
end
if left > 0 then
  for at = 5, #KEYS do
    redis.call('EXISTS', KEYS[at])
  end
end
return taken
