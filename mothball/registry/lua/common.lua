-- Prelude of every registry script.
--
-- KEYS: none. One primary, so key names are built from the namespace; nothing else may begin with it.
-- Standing arguments, the same for every script:
--   ARGV[1]  namespace, without the colon
--   ARGV[2]  about how many events are kept
--   ARGV[3]  ms a finished job's record is kept
--   ARGV[4]  ms until the doorbell of a queued job is repeated for the first time
--   ARGV[5]  ms of the longest pause between two doorbells of a queued job
-- A script's own arguments follow; it reads them with arg(1), arg(2), ...
--
-- NOW is Redis TIME in ms. TIME does not move while a script runs, so a script sees one moment.
local NS = ARGV[1]
local EVENTS_MAX = ARGV[2]
local JOB_TTL = tonumber(ARGV[3])
local RING_AFTER = tonumber(ARGV[4])
local RING_MAX = math.max(tonumber(ARGV[5]), RING_AFTER)
local TIME = redis.call('TIME')
local NOW = TIME[1] * 1000 + math.floor(TIME[2] / 1000)

local function arg(n)
  return ARGV[n + 5]
end

local function key(...)
  return NS .. ':' .. table.concat({...}, ':')
end

-- Lua prints large numbers as 1.2e+14; Redis must never see that.
local function int(n)
  return string.format('%.0f', n)
end

local function count(name, by)
  redis.call('HINCRBY', key('counters'), name, by or 1)
end

-- event(kind, field, value, ...): one entry of the lifecycle stream.
local function event(kind, ...)
  redis.call('XADD', key('events'), 'MAXLEN', '~', EVENTS_MAX, '*', 'kind', kind, ...)
end

-- A digest as a record holds it: one value above 64 bytes would make Redis keep the whole record in the form that takes three times
-- the memory. Records of older versions hold it whole; whoever hands one out says whole_digest.
local function short_digest(digest)
  local hex = string.match(digest, '^sha256:(%x+)$')
  return hex and #hex == 64 and hex or digest
end

local function whole_digest(digest)
  if digest and #digest == 64 and not string.find(digest, ':', 1, true) then
    return 'sha256:' .. digest
  end
  return digest or ''
end

-- Why a workspace cannot be used: code and text, or nil when it is there.
local function workspace_error(ws)
  if redis.call('EXISTS', key('ws', ws)) == 1 then
    return nil
  end
  local reason = redis.call('HGET', key('ws', 'gone', ws), 'reason')
  if reason then
    return 'gone', reason
  end
  return 'not_found', ''
end
