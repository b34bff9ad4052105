-- include: common
-- include: job
-- include: burial
-- Evict a workspace: its record becomes a tombstone. One effect, one counter, one event, unless anything changed since it was decided.
--
-- ARGV  1 id   2 rule   3 detail   4 by whom   5 receipt of a purge, JSON ('' none)   6 '1' a person asks   7 job that asks ('' none)
--       8 its fence   9 ms the tombstone stays   10 the registration that was seen
--       11 'cap' | 'budget': only while that limit is exceeded ('' whatever the limits say)   12 the limit   13 the cap's repo ('' fleet)
--       14... what else was seen: fields and values in turn
-- Returns {'done'} | {'changed', what} | {'gone', ''} | {'busy', job that holds the lease} | {'held', the holds, JSON}
--       | {'state', state that is never evicted}
-- A person overrules a pin, presence and queued jobs; never a hold, somebody else's lease or a submitted workspace.
local id, rule, detail, by, receipt, person, job, fence = arg(1), arg(2), arg(3), arg(4), arg(5), arg(6) == '1', arg(7), arg(8)
local record = key('ws', id)
local v = redis.call('HMGET', record, 'id', 'state', 'registration', 'fence')
if not v[1] then
  return {'gone', ''}
end
if (v[3] or '') ~= arg(10) then
  return {'changed', 'registration'}
end
if job ~= '' and run_of(job, fence) ~= 'run' then
  return {'changed', 'lease'}
end
local other = holder_of(id, job)
if other then
  return {'busy', other}
end
if person then
  if held(record) then
    return {'held', redis.call('HGET', record, 'holds')}
  elseif not EVICTABLE[v[2] or 'active'] then
    return {'state', v[2]}
  end
else
  local what = changed_since(id, 14)
  if what then
    return {'changed', what}
  end
  -- Two who make room at once must not make it twice.
  local taken
  if arg(11) == 'cap' then
    taken = arg(13) == '' and redis.call('ZCARD', key('ws', 'by', 'created')) or redis.call('SCARD', key('ws', 'repo', arg(13)))
  elseif arg(11) == 'budget' then
    local sums = redis.call('HMGET', key('budget'), 'loaded', 'reserved')
    taken = tonumber(sums[1] or '0') + tonumber(sums[2] or '0')
  end
  if taken and taken <= tonumber(arg(12)) then
    return {'changed', arg(11)}
  end
end
evict(id, rule, detail, by, arg(9), receipt)
if job ~= '' then
  -- The job that asked goes on without its record: what it still has to say is the outcome, not the workspace's.
  redis.call('HSET', key('job', job), 'buried', '1')
end
return {'done'}
