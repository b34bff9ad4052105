-- include: common
-- include: job
-- Keep the lease of a run; take it again when it ran out and nobody took over.
--
-- ARGV  1 job   2 fence   3 lease ms
-- Returns {'ok', cancel requested '0'|'1'} | {'lost'}
local id, fence, lease_ms = arg(1), arg(2), tonumber(arg(3))
local status, ws = run_of(id, fence)
if status ~= 'run' then
  return {'lost'}
end
local v = redis.call('HMGET', key('job', id), 'host', 'cancel_requested')
take_lease(id, ws, fence, v[1] or '', lease_ms)
refresh_list(ws)
return {'ok', v[2] or '0'}
